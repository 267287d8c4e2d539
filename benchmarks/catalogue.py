"""Which models there are to sweep, and the fixed sample that covers every pattern."""

from __future__ import annotations

from padfree.files.sources import Source

# 30 of bsconv's architectures: every family, plain and with BSConv, for ImageNet and CIFAR sizes
_MOBILE = ("mobilenetv1_w1", "mobilenetv2_w1", "mobilenetv3_small_w1", "mobilenetv3_large_w1")
_RESIDUAL = (
    "resnet10",
    "resnet18",
    "preresnet18",
    "cifar_resnet20",
    "cifar_resnet110",
    "cifar_preresnet20",
    "cifar_wrn16_4",
)

# One or more names for every row of the tables of patterns: what follows a strided convolution, stems, shortcuts,
# re-parameterised branches, SAME padding, fixed sizes, several outputs, nothing to convert at all.
SAMPLE = (  # noqa: SIM905
    "timm:mobilenetv1_100 timm:mobilenetv2_100 timm:mobilenetv3_small_050 timm:mobilenetv3_large_100 "
    "timm:mobilenetv4_conv_small timm:mobilenetv4_hybrid_medium timm:efficientnet_b0 timm:tf_efficientnet_b0 "
    "timm:tf_efficientnet_lite0 timm:efficientnet_es timm:mixnet_s timm:tf_mixnet_s timm:mnasnet_small timm:fbnetc_100 "
    "timm:lcnet_035 timm:tinynet_e timm:rexnet_100 timm:ghostnet_050 timm:ghostnetv2_100 timm:ghostnetv3_050 "
    "timm:repghostnet_050 timm:mobileone_s1 timm:fastvit_t8 timm:repvit_m0_9 timm:repvgg_a0 timm:efficientvit_b0 "
    "timm:efficientvit_m0 timm:test_byobnet timm:mobilevitv2_050 timm:hgnetv2_b0 timm:xception41 timm:nasnetalarge "
    "timm:regnetx_002 timm:resnet18 timm:resnet18d timm:resnetv2_50 timm:resnetaa50 timm:seresnet18 timm:dla34 "
    "timm:hrnet_w18_small timm:densenet121 timm:inception_v3 timm:test_maxvit timm:coatnet_nano_rw_224 "
    "timm:levit_128s timm:pit_ti_224 timm:mvitv2_tiny timm:vit_tiny_patch16_224 timm:convnext_atto "
    "torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x0_5 torchvision:mnasnet0_5 "
    "torchvision:squeezenet1_1 torchvision:ssdlite320_mobilenet_v3_large torchvision:lraspp_mobilenet_v3_large "
    "bsconv:mobilenetv1_w1_bsconvu bsconv:cifar_resnet20_bsconvu bsconv:cifar_wrn16_4_bsconvu "
    "bsconv:cifar_mobilenetv3_small_w1_bsconvs_p1d6"
).split()


def bsconv_sources() -> list[str]:
    """30 architectures of bsconv."""
    mobile = [
        f"{data}{name}{variant}" for data in ("", "cifar_") for name in _MOBILE for variant in ("", _variant(name))
    ]
    residual = [f"{name}{variant}" for name in _RESIDUAL for variant in ("", "_bsconvu")]
    return [f"bsconv:{name}" for name in (*mobile, *residual)]


def _variant(name: str) -> str:
    return "_bsconvu" if "v1" in name else "_bsconvs_p1d6"


def all_sources() -> list[str]:
    """Every model of timm and torchvision, and bsconv's; not those that others have registered with timm."""
    import timm
    import torchvision

    own = (name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm."))
    names = [f"timm:{name}" for name in own]
    names += [f"torchvision:{name}" for name in torchvision.models.list_models()]
    return names + bsconv_sources()


def input_size(source: Source) -> tuple[int, ...] | None:
    """A size where the model does not say its own: bsconv's CIFAR networks, torchvision's video networks."""
    if source.library == "torchvision":
        import torchvision

        builder = torchvision.models.get_model_builder(source.name)
        if ".video." in builder.__module__:
            return (3, 16, 224, 224)
    return source.input_size
