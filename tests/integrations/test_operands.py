"""What is reported 2:4 is 2:4 where it is used: the operands of every product of many models, against an oracle."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nm_sparsity.core import SparsityReport, sparsify
from nm_sparsity.core.model.layers import sparse_weights

PRODUCTS = {"linear", "addmm", "baddbmm", "matmul", "__matmul__", "mm", "bmm", "multi_head_attention_forward"}
PRODUCTS |= {f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)}


def digest(t: Tensor) -> bytes:
    plain = t.detach().contiguous() + 0.0  # no -0
    return hashlib.blake2b(repr(tuple(t.shape)).encode() + plain.numpy().tobytes()).digest()


class Operands(TorchFunctionMode):
    """Remembers every tensor that goes into a product, 2-D ones transposed too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor) and t.dim() > 1 and t.dtype == torch.float32:
                    self.seen.update(map(digest, (t, t.mT) if t.dim() == 2 else (t,)))
        return func(*args, **(kwargs or {}))


def two_of_four(w: Tensor, dim: int) -> Tensor:
    """`w` with the two largest of every four along `dim`, the first among equals."""
    groups = w.detach().movedim(dim, -1).unflatten(-1, (-1, 4))
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    kept = groups.scatter(-1, order[..., 2:], 0.0)
    return kept.flatten(-2).movedim(-1, dim)


def not_used_as_reported(
    model: nn.Module, run: Callable[[nn.Module], Any], **arguments: Any
) -> tuple[SparsityReport, list[str], list[str]]:
    """The report, the sparse weights that took part in `run`, and those of them that no product saw as they should be.

    A weight took part if it got a gradient.
    """
    report = sparsify(model, "2:4", method="ste", **arguments)
    with Operands() as operands:
        output = run(model)
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    sum(t.float().square().sum() for t in tensors).backward()
    weights = [(name, w, state) for name, w, state in sparse_weights(model) if w.grad is not None]
    wrong = [name for name, w, state in weights if digest(two_of_four(w, *state.dims)) not in operands.seen]
    return report, [name for name, _, _ in weights], wrong


def pictures(size: int, frames: int = 0) -> Callable[[nn.Module], Any]:
    return lambda model: model(torch.randn(2, 3, *[frames] * bool(frames), size, size))


def torchvision_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    from torchvision.models import SwinTransformer, VisionTransformer, get_model
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.maxvit import MaxVit
    from torchvision.models.optical_flow import raft_small

    def named(name: str, size: int = 64, **options: Any) -> Any:
        return lambda: get_model(name, **options), pictures(size)

    small = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5")
    models = {name: named(name) for name in (*small, "regnet_y_400mf", "efficientnet_b0", "densenet121")}
    models |= {
        "googlenet": named("googlenet", aux_logits=False, init_weights=False),
        "vit": (lambda: VisionTransformer(32, 8, 2, 2, 16, 32), pictures(32)),
        "swin": (lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4]), pictures(32)),
        "convnext": (lambda: ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]), pictures(32)),
        "maxvit": (lambda: MaxVit((32, 32), 16, 4, [16, 16], [1, 1], 8, 0.0), pictures(32)),
        "r3d": (lambda: get_model("mc3_18"), pictures(16, frames=4)),
        "raft": (lambda: raft_small(weights=None), lambda m: m(*torch.rand(2, 1, 3, 128, 128), num_flow_updates=1)),
    }
    return models


def timm_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    timm = pytest.importorskip("timm")

    def named(name: str, size: int = 64, **options: Any) -> Any:
        return lambda: timm.create_model(name, **options), pictures(size)

    def bit(conv: Any) -> Any:
        from timm.models.resnetv2 import ResNetV2

        norm = partial(timm.layers.GroupNormAct, num_groups=4)
        return ResNetV2([1, 1], (16, 32), num_classes=8, stem_chs=16, conv_layer=conv, norm_layer=norm)

    def normaliser_free(attention: str) -> Any:
        from timm.models.nfnet import NfCfg, NormFreeNet

        return NormFreeNet(
            NfCfg((1, 1), (16, 32), stem_chs=16, group_size=4, attn_layer=attention, attn_kwargs={}, num_features=32)
        )

    return {
        "bit": (lambda: bit(timm.layers.StdConv2d), pictures(32)),
        "resnetv2": (lambda: bit(timm.layers.create_conv2d), pictures(32)),
        "nfnet": (lambda: normaliser_free("se"), pictures(32)),
        "tf_efficientnet_b0": named("tf_efficientnet_b0"),
        "tf_mobilenetv3_small_minimal_100": named("tf_mobilenetv3_small_minimal_100"),
        "resnet10t": named("resnet10t"),
        "vit": named("vit_tiny_patch16_224", 32, img_size=32, depth=2),
        "beit": named("beitv2_base_patch16_224", 32, img_size=32, depth=1),
        "convnext": named("convnext_atto"),
        "ghostnet": named("ghostnet_050"),
    }


def transformers_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    import transformers as hf
    from transformers_models import FAMILIES, TEXT, WIDTH

    def of(config: Any, kind: Any = hf.AutoModel) -> Callable[[], nn.Module]:
        return lambda: kind.from_config(config)

    def sample(make: Callable[[int], dict[str, Any]]) -> Callable[[nn.Module], Any]:
        return lambda model: model(**{key: value[None] for key, value in make(0).items()}).loss

    def words(model: nn.Module) -> Any:
        return model(input_ids=torch.randint(3, 48, (1, 8)), use_cache=False)[0]

    def pixels(size: int) -> Callable[[nn.Module], Any]:
        return lambda model: model(pixel_values=torch.randn(1, 3, size, size))[0]

    models = {name: (make, sample(batch)) for name, (make, batch, *_) in FAMILIES.items()}
    narrow = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    models |= {
        "falcon": (of(hf.FalconConfig(**narrow, vocab_size=48)), words),
        "opt": (of(hf.OPTConfig(**narrow, ffn_dim=32, word_embed_proj_dim=16, vocab_size=48)), words),
        "bloom": (of(hf.BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=48)), words),
        "mistral": (of(hf.MistralConfig(**WIDTH, **TEXT, num_key_value_heads=1)), words),
        "bit": (
            of(hf.BitConfig(hidden_sizes=[32, 32], depths=[1, 1], embedding_size=32, num_groups=4)),
            pixels(32),
        ),
        "swin": (
            of(hf.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)),
            pixels(32),
        ),
        "segformer": (
            of(hf.SegformerConfig(depths=[1] * 4, hidden_sizes=[16] * 4, num_attention_heads=[1] * 4)),
            pixels(64),
        ),
    }
    return models


def mmdet_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    pytest.importorskip("mmdet")
    import nm_sparsity.detection.plugin  # noqa: F401, I001  before mmdet: it stands in for mmcv's compiled operators
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    def backbone(kind: str, **options: Any) -> Any:
        return lambda: MODELS.build({"type": kind, **options}), pictures(64)

    def resnet(**options: Any) -> Any:
        return backbone("ResNet", depth=18, base_channels=8, norm_eval=False, frozen_stages=-1, **options)

    pyramid = {"type": "FPN", "in_channels": [8, 16], "out_channels": 8, "num_outs": 2}
    head = {"type": "RetinaHead", "num_classes": 4, "in_channels": 8, "stacked_convs": 1, "feat_channels": 8}

    def detector() -> nn.Module:
        body = resnet(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))[0]()
        return nn.Sequential(body, MODELS.build(pyramid), MODELS.build(head))

    normed = {"type": "NormedLinear", "temperature": 20}
    box_head = {"type": "Shared2FCBBoxHead", "in_channels": 8, "fc_out_channels": 16, "roi_feat_size": 2}
    return {
        "resnet": resnet(),
        "resnet GN+WS": resnet(conv_cfg={"type": "ConvWS"}, norm_cfg={"type": "GN", "num_groups": 4}),
        "efficientnet": backbone("EfficientNet", arch="b0", norm_cfg={"type": "BN"}),
        "swin": backbone("SwinTransformer", embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4),
        "retinanet": (detector, pictures(64)),
        "box head": (
            lambda: MODELS.build({**box_head, "cls_predictor_cfg": normed, "num_classes": 7}),
            lambda m: m(torch.randn(3, 8, 2, 2)),
        ),
    }


LIBRARIES = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "mmdet": mmdet_models,
}
OWN_FORWARD = {  # the models whose convolutions or heads compute with something else than their weight
    "timm": ("bit", "nfnet"),
    "transformers": ("bit",),
    "mmdet": ("resnet GN+WS", "box head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_reported_2to4_is_2to4_where_it_is_used(library: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # what the libraries warn of
        models = LIBRARIES[library]()
        failed: dict[str, Sequence[str]] = {}
        for name, (make, run) in models.items():
            torch.manual_seed(0)
            report, used, wrong = not_used_as_reported(make(), run)
            own = [w.name for w in report.weights if "with a forward of its own" in w.note]
            if wrong or bool(own) != (name in OWN_FORWARD.get(library, ())) or len(used) < 0.8 * len(report.sparse):
                failed[name] = [*wrong, f"{len(used)} of {len(report.sparse)} used", f"own forward: {own}"]
    assert not failed


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_the_check_finds_a_layer_that_computes_with_something_else() -> None:
    net = nn.Sequential(Standardised(4, 8, 3), nn.Conv2d(8, 8, 1))
    x = torch.randn(1, 4, 3, 3)
    _, used, wrong = not_used_as_reported(net, lambda model: model(x), trust=[Standardised])
    assert used == ["0.weight", "1.weight"]
    assert wrong == ["0.weight"]
