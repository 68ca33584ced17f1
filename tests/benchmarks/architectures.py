"""What curvature costs on networks that people have, in gradient passes over the same data.

    pip install ".[bench]" transformers timm peft
    python tests/benchmarks/architectures.py            # all networks
    python tests/benchmarks/architectures.py gpt2 vit   # some of them
    python tests/benchmarks/architectures.py --train    # NaturalGradient on defaults trains them
    python tests/benchmarks/architectures.py --train --small    # versions of two or three layers

Random weights; nothing is downloaded. One thread. torchvision is read without its compiled
operators: `pip install --no-deps torchvision`.

`kfac` and `diagonal` are builds from one sample of the labels over several batches; `one` is the
same KFAC over a single batch, with all that is done once. `curvlinops` and `nngeometry` build a
KFAC of the layers that they know, and `same` is ours of what curvlinops takes.
"""

import argparse
import os
import time
import warnings

import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import NNGeoError, UnsupportedLayerError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _without_compiled_operators():
    """torchvision declares shapes of operators that a CPU-only installation may not have."""
    declare = torch.library.register_fake

    def register(name, *args, **kwargs):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return declare(name, *args, **kwargs)

    torch.library.register_fake = register


_without_compiled_operators()


# --- networks -------------------------------------------------------------------------------------


class Sizes:
    """Whether networks are as people have them, or versions of a few narrow layers."""

    small = False

    @classmethod
    def of(cls, whole, small):
        return small if cls.small else whole


def _language(config, cls, n=8, t=128, causal=True):
    model = cls(config).eval()
    ids = torch.randint(0, config.vocab_size, (n, t))
    batch = {"input_ids": ids, "labels": torch.randint(0, config.vocab_size, (n, t))}
    return model, batch, lambda m, b: m(input_ids=b["input_ids"]).logits, -1


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_layer": Sizes.of(8, 2),
        "n_embd": Sizes.of(192, 48),
        "n_head": 6,
        "vocab_size": 1000,
        "n_positions": 256,
    }
    config = GPT2Config(**sizes, tie_word_embeddings=False, attn_implementation="eager")
    return _language(config, GPT2LMHeadModel)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=Sizes.of(192, 48),
        intermediate_size=Sizes.of(512, 128),
        num_hidden_layers=Sizes.of(8, 2),
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    return _language(config, LlamaForCausalLM)


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=Sizes.of(192, 48),
        intermediate_size=Sizes.of(512, 128),
        num_hidden_layers=Sizes.of(8, 2),
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=Sizes.of(32, 8),
        vocab_size=1000,
    )
    return _language(config, Qwen3ForCausalLM)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=Sizes.of(192, 48),
        intermediate_size=Sizes.of(256, 64),
        num_hidden_layers=Sizes.of(4, 2),
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=1000,
    )
    return _language(config, MixtralForCausalLM)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=Sizes.of(192, 48),
        num_hidden_layers=Sizes.of(8, 2),
        num_attention_heads=6,
        intermediate_size=Sizes.of(768, 192),
        vocab_size=1000,
        num_labels=5,
    )
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 1000, (8, 128)), "labels": torch.randint(0, 5, (8,))}
    batch["attention_mask"] = torch.ones(8, 128, dtype=torch.long)
    call = {"input_ids", "attention_mask"}
    return model, batch, lambda m, b: m(**{k: b[k] for k in call}).logits, None


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=Sizes.of(192, 48),
        d_ff=Sizes.of(768, 192),
        num_layers=Sizes.of(4, 2),
        num_heads=6,
        d_kv=Sizes.of(32, 8),
        vocab_size=1000,
    )
    config.tie_word_embeddings = False
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(0, 1000, (8, 64))
    batch = {"input_ids": ids, "labels": torch.randint(0, 1000, (8, 64))}

    def call(m, b):
        return m(input_ids=b["input_ids"], decoder_input_ids=b["labels"]).logits

    return model, batch, call, -1


def lora():
    from peft import LoraConfig, get_peft_model

    model, batch, call, dim = llama()
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    return adapted.eval(), batch, call, dim


def loha():
    from peft import LoHaConfig, get_peft_model

    model, batch, call, dim = llama()
    adapted = get_peft_model(model, LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return adapted.eval(), batch, call, dim


def lokr():
    from peft import LoKrConfig, get_peft_model

    model, batch, call, dim = llama()
    adapted = get_peft_model(model, LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return adapted.eval(), batch, call, dim


def dora():
    from peft import LoraConfig, get_peft_model

    model, batch, call, dim = llama()
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], use_dora=True)
    return get_peft_model(model, config).eval(), batch, call, dim


def ia3():
    from peft import IA3Config, get_peft_model

    model, batch, call, dim = llama()
    names = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    adapted = get_peft_model(model, IA3Config(**names, feedforward_modules=["down_proj"]))
    return adapted.eval(), batch, call, dim


def _images(name, n=16, size=64, **options):
    import timm

    model = timm.create_model(name, num_classes=10, **options).eval()
    x, y = torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))
    return model, (x, y), lambda m, b: m(b[0]), None


def _narrow(**small):
    return small if Sizes.small else {}


TRANSFORMER = {"depth": 2, "embed_dim": 48, "num_heads": 3}
STAGES = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}


def resnet18():
    return _images("resnet18", n=32, size=32, **_narrow(channels=(16, 16, 32, 32)))


def densenet():
    narrow = _narrow(block_config=(2, 2, 2, 2), growth_rate=8)
    return _images("densenet121", n=16, size=Sizes.of(64, 32), **narrow)


def convnext():
    narrow = _narrow(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64))
    return _images("convnext_atto", n=16, size=Sizes.of(64, 32), **narrow)


def vit():
    return _images(
        "vit_tiny_patch16_224", n=16, **_narrow(**TRANSFORMER), img_size=64, patch_size=8
    )


def deit3():
    return _images(
        "deit3_small_patch16_224", n=16, **_narrow(**TRANSFORMER), img_size=64, patch_size=8
    )


def swin():
    size = Sizes.of(112, 56)
    return _images(
        "swin_tiny_patch4_window7_224", n=8, size=size, img_size=size, **_narrow(**STAGES)
    )


def swinv2():
    size = Sizes.of(224, 56)
    return _images("swinv2_cr_tiny_224", n=8, size=size, img_size=size, **_narrow(**STAGES))


def efficientnet():
    name = Sizes.of("efficientnet_b0", "test_efficientnet")
    return _images(name, n=16, size=Sizes.of(64, 32))


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=Sizes.of(192, 48),
        num_hidden_layers=Sizes.of(4, 2),
        num_attention_heads=6,
        intermediate_size=Sizes.of(768, 192),
        conv_dim=(Sizes.of(128, 32),) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_labels=5,
    )
    model = Wav2Vec2ForSequenceClassification(config).eval()
    x, y = torch.randn(Sizes.of(4, 8), Sizes.of(16000, 4800)), torch.randint(0, 5, (4,))
    return model, (x, y), lambda m, b: m(input_values=b[0]).logits, None


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=Sizes.of(192, 48),
        intermediate_size=Sizes.of(768, 192),
        num_hidden_layers=Sizes.of(8, 2),
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
        projection_dim=32,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    x, y = torch.randn(16, 3, 64, 64), torch.randint(0, 32, (16,))
    return model, (x, y), lambda m, b: m(pixel_values=b[0]).image_embeds, None


class _Graph(nn.Module):
    """Two graph convolutions over one graph, whose nodes are the examples."""

    def __init__(self, nodes, features, hidden, classes):
        super().__init__()
        edges = (torch.rand(nodes, nodes) < 4 / nodes).float()
        edges = ((edges + edges.T + torch.eye(nodes)) > 0).float()
        degrees = edges.sum(1).rsqrt()
        self.register_buffer("edges", degrees[:, None] * edges * degrees)
        self.first, self.last = nn.Linear(features, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.edges @ self.last(torch.relu(self.edges @ self.first(x)))


def gcn():
    x, y = torch.randn(256, 128), torch.randint(0, 7, (256,))
    return _Graph(256, 128, 64, 7).eval(), (x, y), lambda m, b: m(b[0]), None


NETWORKS = {
    f.__name__: f
    for f in (
        *(gpt2, llama, qwen3, mixtral, bert, t5, lora, dora, loha, lokr, ia3),
        *(resnet18, densenet, convnext, efficientnet, vit, deit3, clip, swin, swinv2),
        *(wav2vec2, gcn),
    )
}


# --- measurement ----------------------------------------------------------------------------------


def seconds(run):
    start = time.process_time()  # of this one thread: a busy machine makes it wait, not work
    run()
    return time.process_time() - start


class Gradient:
    """A gradient pass over one batch, which everything else is a multiple of."""

    def __init__(self, model, batch, call, batches):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        self.model, self.batch, self.call, self.batches = model, batch, call, batches
        self()

    def __call__(self):
        out = self.call(self.model, self.batch)
        loss = nn.functional.cross_entropy(out.flatten(0, -2), self.labels.flatten())
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def multiple(self, run, batches=None, rounds=2):
        """The time of something as a multiple, of the passes over as many batches around it."""
        batches, found = batches or self.batches, []
        run()
        for _ in range(rounds):
            before = sum(seconds(self) for _ in range(batches))
            own = seconds(run)
            after = sum(seconds(self) for _ in range(batches))
            found.append(2 * own / (before + after))
        return round(sum(found) / rounds, 2)


def kinds(F):
    """How many numbers lie in Kronecker, diagonal and general blocks."""
    count = {"in Kronecker": 0, "in diagonal": 0, "general": 0}
    for row in F.report():
        kronecker = "Kronecker" in row.block
        kind = "in Kronecker" if kronecker else "in diagonal"
        kind = "general" if "general" in row.form else kind
        count[kind] += row.size
    return count


class _Logits(nn.Module):
    """The network as the other packages want it: one tensor in, (N, C) out."""

    def __init__(self, model, batch, call):
        super().__init__()
        self.model, self.call = model, call
        self.rest = batch if isinstance(batch, dict) else None

    def forward(self, x):
        batch = (x, None) if self.rest is None else {**self.rest, "input_ids": x}
        return self.call(self.model, batch).flatten(0, -2)


def _known_layers(model):
    """The parameters of linear layers and of two-dimensional convolutions."""
    modules = model.named_modules()
    kinds = (nn.Linear, nn.Conv2d)
    own = [(f"{path}.", m) for path, m in modules if type(m) in kinds]
    return [
        (prefix + name).lstrip(".")
        for prefix, m in own
        for name, p in m.named_parameters(recurse=False)
        if p.requires_grad
    ]


def curvlinops(model, batch, call, batches):
    from curvlinops import KFACLinearOperator

    named = dict(model.named_parameters())
    parameters = [named[name] for name in _known_layers(model)]
    x, y = (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else batch

    def build():
        operator = KFACLinearOperator(
            _Logits(model, batch, call),
            nn.CrossEntropyLoss(),
            parameters,
            [(x, y.flatten())] * batches,
            check_deterministic=False,
            fisher_type="mc",
            num_per_example_loss_terms=y[0].numel(),
            separate_weight_and_bias=False,
            num_data=len(x) * batches,
        )
        operator.compute_kronecker_factors()

    return build


def nngeometry(model, batch, call, batches):
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object.pspace import PMatKFAC

    if isinstance(batch, dict):
        raise TypeError("takes tensors alone")
    layers = LayerCollection.from_model(model)  # of a model whose layers it all knows
    loader = [batch] * batches
    return lambda: FIM_MonteCarlo(model, loader, PMatKFAC, layer_collection=layers)


def measure(name, what, batches):
    torch.manual_seed(0)
    model, batch, call, dim = NETWORKS[name]()
    likelihood = ng.likelihoods.Categorical(class_dim=dim)
    fisher = {"likelihood": likelihood, "forward": call, "estimator": "mc", "seed": 0}
    if isinstance(batch, dict):
        fisher["target"] = lambda b: b["labels"]
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradient = Gradient(model, batch, call, batches)
    g = min(seconds(gradient) for _ in range(3))
    row, F = {"network": name, "parameters": size, "gradient ms": round(1e3 * g, 1)}, None
    v = torch.randn(size)

    def product(A):
        return gradient.multiple(lambda: A @ v, 1)  # graphs are made and kept

    common = {k: fisher[k] for k in ("forward", "target") if k in fisher}
    for column in what:
        if column in ("kfac", "diagonal", "ekfac"):
            holder = []

            def build(column=column, holder=holder):
                holder[:] = [ng.FIM(model, [batch] * batches, column, **fisher)]

            row[column] = gradient.multiple(build)
            F = holder[0] if column == "kfac" else F
        elif column == "one":
            row[column] = gradient.multiple(lambda: ng.FIM(model, batch, "kfac", **fisher), 1)
        elif column == "same" and not _known_layers(model):
            row[column] = "none"
        elif column == "same":
            own = {**fisher, "params": _known_layers(model)}
            ours = lambda own=own: ng.FIM(model, [batch] * batches, "kfac", **own)  # noqa: E731
            row[column] = gradient.multiple(ours)
        elif column in PEERS:
            row[column] = _of_peer(PEERS[column], model, batch, call, gradient)
        elif column == "ggn":
            row[column] = product(ng.GGN(model, batch, loss=likelihood, **common))
        elif column == "hessian":
            row[column] = product(ng.Hessian(model, batch, loss=likelihood, **common))
    if F is not None:
        row |= kinds(F)
    return row, F


# --- training -------------------------------------------------------------------------------------

OUTPUTS = {"clip": lambda result: result.image_embeds}  # of models without .logits


def learnable(name):
    """A network in training mode, what calls it, and minibatches whose labels can be learnt."""
    torch.manual_seed(0)
    model, batch, call, _ = NETWORKS[name]()
    generator = torch.Generator().manual_seed(0)

    def language(n):
        """The next token is the present one plus its last step, as far as there are tokens."""
        start, stride = (torch.randint(1, 50, (n, 1), generator=generator) for _ in range(2))
        ids = (start + stride * torch.arange(33)) % 61
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def classes(n):
        """Whether the first tokens of a sequence are small."""
        ids = torch.randint(1, 1000, (n, 32), generator=generator)
        labels = (ids[:, :4] < 500).sum(1)
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def images(n):
        """Stripes in one of ten directions, and noise."""
        size = batch[0].shape[-1]
        y = torch.randint(10, (n,), generator=generator)
        at = torch.arange(size) * (2 * torch.pi * 3 / size)
        angle = (y * torch.pi / 10)[:, None, None]
        waves = (at[:, None] * angle.sin() + at * angle.cos()).sin()
        noise = torch.randn(n, 3, size, size, generator=generator)
        return waves[:, None] + 0.5 * noise, y

    def nodes(n):
        """Which of the first features is largest, summed over neighbours."""
        x = torch.randn(n, batch[0].shape[1], generator=generator)
        return x, (model.edges @ x)[:, :7].argmax(1)

    def sounds(n):
        """Tones of five pitches, and noise."""
        y = torch.randint(5, (n,), generator=generator)
        tones = (torch.arange(batch[0].shape[1]) * (0.05 * (y + 1))[:, None]).sin()
        return tones + 0.5 * torch.randn(tones.shape, generator=generator), y

    if isinstance(batch, dict):
        return model.train(), call, lambda: (classes if name == "bert" else language)(8)
    make = {1: nodes if name == "gcn" else sounds, 3: images}[batch[0].dim() - 1]
    n = len(batch[0]) if name == "gcn" else min(16, len(batch[0]))
    return model.train(), call, lambda: make(n)


def losses_of(model, call, batches, representation, outputs=None):
    """The losses of steps on defaults."""
    likelihood = "categorical" if representation == "implicit" else None
    optimizer = ng.optim.NaturalGradient(model, representation, likelihood, seed=0, outputs=outputs)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        out = call(model, batch)
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        loss = nn.functional.cross_entropy(out.flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(name, representation):
    """20 steps on one batch and 60 on minibatches: (start, end, largest / start) of each."""
    row = []
    for many in (False, True):
        model, call, make = learnable(name)
        one = make()
        batches = (make() for _ in range(60)) if many else (one for _ in range(20))
        losses = losses_of(model, call, batches, representation, OUTPUTS.get(name))
        k = 10 if many else 1
        start, end = sum(losses[:k]) / k, sum(losses[-k:]) / k
        row.append((start, end, max(losses) / losses[0]))
    return row


def train_all(names, representations):
    """Print what training does, and fail if a loss does not fall."""
    failed = []
    for name in names:
        for representation in representations:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                try:
                    rows = train(name, representation)
                except ImportError as error:
                    print(f"{name}: {error}", flush=True)
                    break
                except UnsupportedLayerError:  # whose message says what to take
                    representation = "implicit"
                    rows = train(name, representation)
            fell = all(end < begin for begin, end, _ in rows)
            failed += [] if fell else [f"{name} ({representation})"]
            shown = "; ".join(f"{a:.3f} -> {b:.3f}, at most {m:.2f} x" for a, b, m in rows)
            seconds = time.perf_counter() - start
            print(f"{name:<14}{representation:<10}{shown}  {seconds:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"the loss does not fall on {failed}")


PEERS = {"curvlinops": curvlinops, "nngeometry": nngeometry}


def _of_peer(make, model, batch, call, gradient):
    """Its time, or how it fails."""
    try:
        return gradient.multiple(make(model, batch, call, gradient.batches))
    except Exception as error:  # noqa: BLE001 - that a package fails is a result
        return type(error).__name__


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    columns = "kfac,one,diagonal,same,curvlinops,nngeometry,ekfac,ggn,hessian"
    parser.add_argument("--what", default=columns)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--notes", action="store_true", help="print what is not Kronecker, and why")
    parser.add_argument("--train", nargs="?", const="kfac", help="representations to train with")
    parser.add_argument("--small", action="store_true", help="networks of two or three layers")
    given = parser.parse_args()
    Sizes.small = given.small
    torch.set_num_threads(1)
    if given.train:
        train_all(given.networks or NETWORKS, given.train.split(","))
        return
    header = None
    for name in given.networks or NETWORKS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                row, F = measure(name, given.what.split(","), given.batches)
            except (ImportError, NNGeoError) as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
        if header is None:
            header = list(row)  # of the first network
            print(" | ".join(header))
        print(" | ".join(str(row.get(column, "")) for column in header), flush=True)
        if given.notes and F is not None:
            for r in F.report():
                if "general" in r.form or r.note:
                    print("   ", r.parameter, r.size, r.form, r.block, r.note)


if __name__ == "__main__":
    main()
