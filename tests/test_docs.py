"""The pages: their code runs, their links lead somewhere, their words are plain."""

import ast
import contextlib
import importlib.util
import inspect
import re
import typing
from pathlib import Path
from typing import Literal

import matplotlib
import pytest
import torch
import words

import nngeo_lazy as ng

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# no prose: a table that a test makes, notes of releases, and the reference
NO_PROSE = {"from_nngeometry.md", "support_matrix.md", "changelog.md"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def code_of(path):
    """Blocks of Python that run one after the other; `py` marks what is only shown."""
    return re.findall(r"^```python\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE)


def anchors(path):
    """The headings of a page, as the site names them."""
    found = set()
    for line in re.sub(r"^```.*?^```$", "", text_of(path), flags=re.M | re.S).splitlines():
        if heading := re.match(r"#+ (.*)", line):
            plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in PAGES if code_of(p)], ids=name_of)
def test_every_block_runs(path, tmp_path, monkeypatch):
    """One after the other, as a reader would run them."""
    if "nngeometry" in "".join(code_of(path)):
        pytest.importorskip("nngeometry")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in code_of(path):
        exec(compile(code, name_of(path), "exec"), names)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_is_only_shown_is_python_too(path):
    for code in re.findall(r"^```py\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE):
        if "--8<--" not in code:
            ast.parse(code)


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{link}: {target} has no such heading"


def test_every_page_is_in_the_navigation():
    for path in DOCS.rglob("*.md"):
        assert f" {path.relative_to(DOCS).as_posix()}\n" in NAV + "\n", f"{path} is in no menu"


def test_every_example_has_a_page_that_asks_a_question():
    for path in EXAMPLES:
        page = DOCS / "gallery" / f"{path.stem}.md"
        text = text_of(page)
        assert text.split("\n")[0].endswith("?")
        assert f'--8<-- "examples/{path.name}"' in text


# --- the reference --------------------------------------------------------------------------------

MODULES = ["errors", "likelihoods", "optim", "representations", "plot", "gp", "testing"]
NO_ENTRY = {"NAMES", "ESTIMATORS"}  # plain data


def test_the_reference_has_every_public_name():
    entries = set()
    for path in (DOCS / "api").glob("*.md"):
        entries |= set(re.findall(r"^::: nngeo_lazy\.(\S+)$", text_of(path), re.MULTILINE))
    for name in ng.__all__:
        module = type(getattr(ng, name)).__name__ == "module"
        assert module or name in entries, f"{name} is in no page of the reference"
    for name in MODULES:
        module = importlib.import_module(f"nngeo_lazy.{name}")
        for each in set(module.__all__) - NO_ENTRY:
            assert f"{name}.{each}" in entries, f"{name}.{each} is in no page of the reference"


@pytest.mark.parametrize("error", ng.errors.__all__)
def test_every_error_is_explained(error):
    text = text_of(DOCS / "errors.md")
    if error == "NNGeoError":
        assert error in text
        return
    section = re.search(rf"^## {error}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"docs/errors.md has no section {error}"
    assert "**It means:**" in section[1]
    assert "what to do" in section[1].lower()


# --- docstrings of what is public -----------------------------------------------------------------

ROOMS = ["", ".optim", ".likelihoods", ".representations", ".gp", ".linalg"]


def public():
    """What a user calls, by name, once."""
    found = {}
    for room in ROOMS:
        if room == ".gp" and importlib.util.find_spec("gpytorch") is None:
            continue
        module = importlib.import_module(f"nngeo_lazy{room}")
        for name in module.__all__:
            each = getattr(module, name)
            if inspect.isfunction(each) or (inspect.isclass(each) and each.__doc__):
                found.setdefault(each, f"{module.__name__}.{name}")
    return {name: each for each, name in found.items()}


def needed(each):
    """The sections that its docstring must have."""
    made = each
    if inspect.isclass(each):
        if issubclass(each, Exception):
            return []
        made = vars(each).get("__post_init__", vars(each).get("__init__"))
    code = ""
    with contextlib.suppress(OSError, TypeError):  # what a dataclass generates has no source
        code = inspect.getsource(inspect.unwrap(made))
    found = [r">>> "]
    if [n for n in inspect.signature(each).parameters if n not in ("args", "kwargs")]:
        found.append("(?:Args|Attributes):")
    if inspect.isfunction(each) and each.__annotations__.get("return") not in (None, "None"):
        found.append("Returns:")
    if re.search(r"^ *raise |check_fields|@checked", code, re.MULTILINE):
        found.append("Raises:")
    return found


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_says_all_that_a_caller_needs(name):
    """Arguments, what is returned, which errors, and an example that runs (pytest's doctests)."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    if inspect.isclass(PUBLIC[name]):
        text = inspect.cleandoc(PUBLIC[name].__doc__)
    missing = [s for s in needed(PUBLIC[name]) if not re.search(rf"^ *{s}", text, re.MULTILINE)]
    assert not missing, f"{name} lacks {missing}"


def test_the_sections_that_are_needed():
    def whole(x) -> "int":
        raise ValueError(x)

    assert needed(whole) == [">>> ", "(?:Args|Attributes):", "Returns:", "Raises:"]
    assert needed(lambda: None) == [">>> "]
    assert needed(ng.errors.DataError) == []
    assert len(PUBLIC) > 70


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [p for p in PAGES if p.name not in NO_PROSE and p.parent.name != "api"],
    ids=name_of,
)
def test_pages_are_easy_to_read(path):
    """Flesch's reading ease of at least 50, and fewer than 20 words in a sentence."""
    _, length, ease = words.figures(text_of(path))
    assert length < 20, f"{length:.1f} words in a sentence"
    assert ease >= 50, f"a reading ease of {ease:.0f}"


SOURCES = sorted((ROOT / "nngeo_lazy").rglob("*.py"))


def docstrings_of(path):
    """Prose of all docstrings of a module, without their examples."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, kinds)]
    found = [ast.get_docstring(node) or "" for node in nodes]
    return [re.sub(r"^Examples?:\n(?:[ ].*\n?|\n)*", "", text, flags=re.M) for text in found]


@pytest.mark.parametrize("path", [p for p in SOURCES if any(docstrings_of(p))], ids=name_of)
def test_docstrings_are_easy_to_read(path):
    """Fewer than 20 words in a sentence of a module, and at most 30 in any."""
    sentences = [s for text in docstrings_of(path) for s in words.prose(text)]
    lengths = {s: len(words.WORD.findall(s)) for s in sentences}
    assert sum(lengths.values()) < 20 * len(lengths)
    assert not [s for s, length in lengths.items() if length > 30]


def test_the_prose_of_docstrings_has_no_examples(tmp_path):
    body = "Sum.\n\n    Example:\n        >>> add(1)\n        2\n\n    Source: Gauss (1809).\n    "
    (tmp_path / "a.py").write_text(f'"""Numbers."""\ndef add(x):\n    """{body}"""\n')
    assert [words.prose(text) for text in docstrings_of(tmp_path / "a.py")] == [
        ["Numbers."],
        ["Sum.", "Source: Gauss (1809)."],
    ]


def test_the_measure_of_words():
    easy = "The cat sat. It was a big cat.\n\n```python\nx = 1\n```\n\n| a | b |\n|---|---|\n"
    assert words.prose(easy) == ["The cat sat.", "It was a big cat."]
    count, length, ease = words.figures(easy)
    assert (count, length) == (8, 4.0)
    assert ease == pytest.approx(206.835 - 1.015 * 4 - 84.6)
    hard = "Representational approximations necessitate considerable computational sophistication."
    assert words.figures(hard)[2] < 0
    known = {"layer": 2, "matrix": 2, "matrices": 3, "likelihood": 4, "created": 3, "value": 2}
    assert {word: words.syllables(word) for word in known} == known


# a word for each meaning; what is left of the colon is not written
ONE_TERM = {
    r"\b(?:data ?points?|datapoints?)\b": "example",
    r"\bridge (?:term|parameter)\b|\bTikhonov\b|\bjitter\b": "damping",
    r"\bGGN matrix\b|\bgeneralized\b": "Gauss-Newton matrix",
    r"\bEF matrix\b|\bempirical FIM\b": "empirical Fisher",
    r"\bMonte-Carlo\b": "Monte Carlo",
    r"\bKronecker factored\b|\bK-FAC\b": "KFAC",
    r"\bHVPs?\b|\bmatvecs? product\b": "product",
    r"\bhyper-?parameters?\b": "option",
    r"\bweights and biases\b.{0,3}\bparameters\b": "parameters",
    r"\bregulari[sz]er\b": "damping",
    r"\bmatrix free\b": "matrix-free",
}


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != "glossary.md"], ids=name_of)
def test_one_term_for_one_thing(path):
    for sentence in words.prose(text_of(path)):
        for pattern, term in ONE_TERM.items():
            assert not re.search(pattern, sentence), f"write {term!r}: {sentence}"


def test_the_glossary_is_sorted_and_says_each_term_once():
    terms = re.findall(r"^(\S.*)\n: ", text_of(DOCS / "glossary.md"), re.MULTILINE)
    assert len(terms) > 25
    assert terms == sorted(set(terms), key=str.lower)


def test_an_editor_completes_what_may_be_given():
    """The Literal types of signatures have the names that are known."""
    for parameter, known in [
        ("representation", ng.representations.NAMES),
        ("likelihood", ng.likelihoods.NAMES),
        ("estimator", ng.likelihoods.ESTIMATORS),
    ]:
        hint = eval(ng.FIM.__annotations__[parameter], ng.FIM.__globals__)
        literals = [t for t in (hint, *typing.get_args(hint)) if typing.get_origin(t) is Literal]
        assert [sorted(typing.get_args(t)) for t in literals] == [sorted(known)]


@pytest.mark.parametrize(
    ("options", "page"),
    [
        ({"representation": "kfacc"}, "choose"),
        ({"estimator": "exactly"}, "choose"),
        ({"likelihood": "softmax"}, "data"),
    ],
)
def test_a_wrong_option_names_the_options_and_a_page(options, page):
    model, x, y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(ng.errors.DataError, match=f"expected one of .*docs/{page}.md explains"):
        ng.FIM(model, (x, y), **options)


def test_every_page_that_an_error_names_is_there():
    sources = "".join(text_of(p) for p in (ROOT / "nngeo_lazy").rglob("*.py"))
    pages = set(re.findall(r"docs/(\w+)\.md", sources))
    pages |= set(re.findall(r'wrong_option\([^)]*"(\w+)"\)', sources))
    assert len(pages) > 6
    for page in pages:
        assert (DOCS / f"{page}.md").exists(), page
