"""Networks that people have, small and in float64, against loops of autograd over single examples.

They are skipped if their package is missing: `pip install transformers timm peft`, and torchvision.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Categorical

from cases import close

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import architectures  # noqa: F401 - so that torchvision is imported without its operators

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of foreign packages
]
N = 3


class Float64(TorchFunctionMode):
    """Inside, what casts to float32 on the way stays float64: rounding hides no difference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


def _text(module, config, cls, vocabulary=7, t=4, **options):
    transformers = pytest.importorskip(module)
    sizes = {"vocab_size": vocabulary, **options}
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    ids = torch.randint(1, vocabulary, (N, t))
    return model, {"input_ids": ids}


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def gpt2(**options):
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8, **options}
    return _text("transformers", "GPT2Config", "GPT2LMHeadModel", **sizes)


def llama():
    sizes = {**SMALL, "num_key_value_heads": 1}
    return _text("transformers", "LlamaConfig", "LlamaForCausalLM", **sizes)


def qwen3():
    sizes = {**SMALL, "num_key_value_heads": 1, "head_dim": 4}
    return _text("transformers", "Qwen3Config", "Qwen3ForCausalLM", **sizes)


def mixtral(implementation="eager"):
    sizes = {**SMALL, "num_key_value_heads": 1, "num_local_experts": 3}
    model, batch = _text("transformers", "MixtralConfig", "MixtralForCausalLM", **sizes)
    model.set_experts_implementation(implementation)
    return model, batch


def bert():
    sizes = {**SMALL, "num_labels": 3, "max_position_embeddings": 8}
    model, batch = _text("transformers", "BertConfig", "BertForSequenceClassification", **sizes)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 2:] = 0
    return model, {**batch, "attention_mask": mask}


def t5():
    sizes = {"d_model": 8, "d_ff": 6, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model, batch = _text("transformers", "T5Config", "T5ForConditionalGeneration", **sizes)
    return model, {**batch, "decoder_input_ids": torch.randint(1, 7, (N, 2))}


def _adapted(kind, **options):
    peft = pytest.importorskip("peft")
    model, batch = llama()
    config = getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **options)
    adapted = peft.get_peft_model(model, config)
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return adapted, batch


def _images(package, make, size=8):
    return make(pytest.importorskip(package)), torch.randn(N, 3, size, size)


def vit():
    def make(timm):
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
        return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=3)

    return _images("timm", make)


def swin():
    def make(timm):
        sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 4, "depths": (2, 2)}
        more = {"num_heads": (1, 2), "window_size": 4, "num_classes": 3}
        return timm.models.swin_transformer.SwinTransformer(**sizes, **more)

    return _images("timm", make, 16)


def convnext():
    def make(timm):
        sizes = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 8), "num_classes": 3}
        return timm.models.convnext.ConvNeXt(**sizes)

    return _images("timm", make, 32)


def resnet18():
    def make(timm):
        block = timm.models.resnet.BasicBlock
        sizes = {"channels": (4, 4, 6, 8), "stem_width": 4, "num_classes": 3}
        return timm.models.resnet.ResNet(block, (2, 2, 2, 2), **sizes)

    return _images("timm", make, 32)


def densenet():
    def make(torchvision):
        sizes = {"growth_rate": 3, "block_config": (2, 2), "num_init_features": 4}
        return torchvision.models.DenseNet(**sizes, bn_size=2, num_classes=3)

    return _images("torchvision", make, 32)


NETWORKS = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False),
    "llama": llama,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "mixtral-batched": lambda: mixtral("batched_mm"),
    "bert": bert,
    "t5": t5,
    "lora": lambda: _adapted("LoraConfig", r=2),
    "dora": lambda: _adapted("LoraConfig", r=2, use_dora=True),
    "ia3": lambda: _adapted("IA3Config", feedforward_modules=[]),
    "loha": lambda: _adapted("LoHaConfig", r=2),
    "lokr": lambda: _adapted("LoKrConfig", r=2),
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "resnet18": resnet18,
    "densenet": densenet,
}


def _call(model, batch):
    with Float64():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(out, "logits", out)


def _one(batch, k):
    if isinstance(batch, dict):
        return {name: t[k : k + 1] for name, t in batch.items()}
    return batch[k : k + 1]


def _flat(gradients, parameters):
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def _rows(model, batch, parameters):
    """Of each example J (C, P) and the outputs (..., classes)."""
    for k in range(N):
        outputs = _call(model, _one(batch, k))[0]
        grad = torch.autograd.grad
        rows = [
            _flat(grad(f, parameters, retain_graph=True, allow_unused=True), parameters)
            for f in outputs.flatten()
        ]
        yield torch.stack(rows), outputs.detach()


@pytest.mark.parametrize("name", NETWORKS)
def test_small_architectures(name):
    torch.manual_seed(0)
    model, batch = NETWORKS[name]()
    model = model.double().eval()
    for p in model.parameters():
        if p.requires_grad:  # what begins at zero or one tells little
            p.data += 0.1 * torch.randn_like(p)
    labels = torch.randint(3, _call(model, batch).shape[:-1])
    options = {
        "likelihood": Categorical(class_dim=-1),
        "forward": lambda m, b: _call(m, b if isinstance(b, dict) else b[0]),
        "target": lambda b: labels,
    }
    data = batch if isinstance(batch, dict) else [(batch,)]
    F = ng.FIM(model, data, "diagonal", **options)
    named = dict(model.named_parameters())
    parameters = [named[n] for n in F.space.names]

    v, total, empirical, product = torch.randn(len(F.space)), 0, 0, 0
    blocks = {n: 0 for n in F.space.names if named[n].numel() <= 300}
    for k, (J, outputs) in enumerate(_rows(model, batch, parameters)):
        p = outputs.softmax(-1).reshape(-1, outputs.shape[-1])
        H = torch.block_diag(*(each.diag() - torch.outer(each, each) for each in p)) / N
        total = total + (J * (H @ J)).sum(0)
        product = product + J.mT @ (H @ (J @ v))
        one_hot = nn.functional.one_hot(labels[k], outputs.shape[-1]).reshape(p.shape)
        empirical = empirical + ((p - one_hot).flatten() @ J).square() / N
        for n in blocks:
            mine = J[:, F.space.slices[n]]
            blocks[n] = blocks[n] + mine.mT @ H @ mine
    close(F.diagonal(), total, 1e-9)
    close(
        ng.FIM(model, data, "diagonal", estimator="empirical", **options).diagonal(),
        empirical,
        1e-9,
    )
    close(ng.FIM(model, data, "implicit", **options) @ v, product, 1e-9)
    chosen = list(blocks)
    B = ng.FIM(model, data, "block_diagonal", params=chosen, **options)
    for n, block in blocks.items():
        close(B.block(n).to_dense(), block, 1e-9)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = nn.functional.cross_entropy(
            _call(model, batch).flatten(0, -2), labels.flatten(), reduction="sum"
        )
        slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        slope = _flat(slopes, parameters) @ v
        hv = _flat(torch.autograd.grad(slope, parameters, allow_unused=True), parameters) / N
    options["loss"] = options.pop("likelihood")
    close(ng.Hessian(model, data, **options) @ v, hv, 1e-9)
    kfac = ng.FIM(model, data, "kfac", likelihood=options.pop("loss"), estimator="mc", **options)
    assert [row.parameter for row in kfac.report() if "general" in row.form] == []


ADAPTERS = [name for name in NETWORKS if name in ("lora", "dora", "ia3", "loha", "lokr")]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_trained(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, batch = NETWORKS[name]()
    model, labels = model.float(), torch.randint(7, (N, 4))
    optimizer = ng.optim.NaturalGradient(model, likelihood=Categorical(class_dim=-1))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        logits = model(**batch).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 1.05 * losses[0]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(optimizer.operator.space.names) == trained
    options = {"target": lambda b: labels, "likelihood": Categorical(class_dim=-1)}
    options["forward"] = lambda m, b: m(**b).logits
    model.eval()
    F = ng.FIM(model, batch, "kfac", estimator="mc", seed=0, **options)
    if name in ("lora", "dora"):
        linear = [row for row in F.report() if "lora_A" in row.parameter]
        assert linear
        assert all(row.block.startswith("Kronecker") for row in linear)
    with torch.autocast("cpu", torch.bfloat16):
        half = ng.FIM(model, batch, "kfac", estimator="mc", seed=0, **options)
    assert [row.block for row in half.report()] == [row.block for row in F.report()]
