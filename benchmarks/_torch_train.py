"""The peers of `train_step.py`: whole training steps of PyTorch models.

SimMIM and MAE are those of `transformers`; MoCo v3 is `_torch_moco.py`. All attend with
`scaled_dot_product_attention`, have the exact GELU and AdamW in its fused form.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from _step_shapes import ADAMW, MOMENTUM, REMOVED, TAU, Shape, Side, cores

EPSILON = 1e-6  # of LayerNorm
LABELS = {False: "torch eager, SDPA", True: "torch.compile, SDPA"}


def make(
    compiled: bool,
    method: str,
    shape: Shape,
    views: np.ndarray,
    hidden: np.ndarray,
    device: str,
) -> Side:
    """PyTorch's row, eager or under torch.compile, two steps old.

    Args:
      views: float32 (2, B, rows, columns, 3), normalised; SimMIM and MAE take one.
      hidden: bool (B, N), the patches that SimMIM hides.
      device: "cpu" or "cuda".
    """
    if device == "cpu":
        torch.set_num_threads(cores())
    before = memory(device)
    model, after = MODELS[method](shape)
    model.to(device).train()
    inputs = INPUTS[method](views, hidden, device)
    forward = torch.compile(model) if compiled else model
    step = make_step(model, forward, inputs, after, shape, device)
    begun = time.perf_counter()
    first = step(1)
    seconds = time.perf_counter() - begun
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step(1)
    cuda = device == "cuda"
    return Side(
        label=LABELS[compiled],
        run=step,
        first=first,
        trained=sum(x.numel() for x in model.parameters() if x.requires_grad),
        compile_s=seconds if compiled else None,
        memory=torch.cuda.max_memory_allocated() - before if cuda else None,
    )


def gpu() -> str | None:
    """The name of the CUDA GPU, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def memory(device: str) -> int:
    """Bytes of the GPU that are taken now."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def make_step(
    model: torch.nn.Module,
    forward: Callable,
    inputs: dict[str, torch.Tensor],
    after: Callable,
    shape: Shape,
    device: str,
) -> Callable[[int], float]:
    """`run(steps)`: so many steps, then the last loss, when the device is done.

    `after` comes before the forward pass, where MoCo v3 moves its teacher.
    """
    optimizer = torch.optim.AdamW(
        [x for x in model.parameters() if x.requires_grad],
        lr=ADAMW["base"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        fused=True,
    )
    half = {"dtype": torch.bfloat16, "enabled": shape.dtype == "bfloat16"}

    def run(steps: int) -> float:
        for _ in range(steps):
            after()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, **half):
                found = forward(**inputs)
                loss = found if isinstance(found, torch.Tensor) else found.loss
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run


def simmim(shape: Shape) -> tuple[torch.nn.Module, Callable]:
    """ViTForMaskedImageModeling: learned positions, no relative bias, no layer scale,
    as our encoder is set here; its decoder is the same 1x1 product."""
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(**common(shape), encoder_stride=shape.patch)
    return ViTForMaskedImageModeling(config), lambda: None


def mae(shape: Shape) -> tuple[torch.nn.Module, Callable]:
    """ViTMAEForPreTraining with normalised pixels; it draws its own masks."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **common(shape),
        decoder_hidden_size=shape.decoder["width"],
        decoder_num_hidden_layers=shape.decoder["depth"],
        decoder_num_attention_heads=shape.decoder["heads"],
        decoder_intermediate_size=4 * shape.decoder["width"],
        mask_ratio=REMOVED,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config), lambda: None


def moco_v3(shape: Shape) -> tuple[torch.nn.Module, Callable]:
    """The transcription, and its teacher's update."""
    from _torch_moco import MoCoV3

    model = MoCoV3(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        patch=shape.patch,
        image=shape.image,
        projector=shape.projector,
        predictor=shape.predictor,
        tau=TAU,
    )
    return model, lambda: model.move_teacher(MOMENTUM)


def common(shape: Shape) -> dict:
    """What both configurations of transformers share; "gelu" there is the exact one."""
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
        "attn_implementation": "sdpa",
    }


def one_view(views: np.ndarray, hidden: np.ndarray, device: str) -> dict:
    return {"pixel_values": channels_first(views[0], device)}


def masked_view(views: np.ndarray, hidden: np.ndarray, device: str) -> dict:
    mask = torch.from_numpy(hidden).to(device)
    return one_view(views, hidden, device) | {"bool_masked_pos": mask}


def two_views(views: np.ndarray, hidden: np.ndarray, device: str) -> dict:
    first, second = (channels_first(x, device) for x in views)
    return {"first": first, "second": second}


def channels_first(images: np.ndarray, device: str) -> torch.Tensor:
    """(B, rows, columns, 3) -> (B, 3, rows, columns)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


MODELS = {"simmim": simmim, "mae": mae, "moco_v3": moco_v3}
INPUTS = {"simmim": masked_view, "mae": one_view, "moco_v3": two_views}
