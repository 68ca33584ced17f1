"""Functions on any linear operator: solve, spectra, estimates, approximations, function space."""
