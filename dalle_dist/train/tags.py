"""Under which tags TensorBoard shows the numbers of log.jsonl: in groups, from this one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

GROUPS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "loss_text", "loss_image", "nll", "kl", "elb"),
    "held_out": ("held_out_text", "held_out_image", "held_out_loss", "caption_gain"),
    "quality": (
        "psnr",
        "ssim",
        "identification_r1",
        "identification_r10",
        "identification_rank",
        "completion_r1",
        "completion_r10",
        "completion_rank",
        "image_to_text_r1",
        "image_to_text_r10",
        "text_to_image_r1",
        "text_to_image_r10",
    ),
    "codes": ("codes_in_use", "codes_entropy", "codes_perplexity", "codes_collapsed"),
    "speed": (
        "seconds_per_step",
        "data_wait",
        "images_per_s",
        "tokens_per_s",
        "mfu",
        "peak_memory_bytes",
        "seconds_left",
        "slowest_rank",
        "slowest_ratio",
    ),
    "optimizer": ("lr", "grad_norm", "temperature", "kl_weight", "logit_scale", "skipped"),
    "gradients": (
        "scale",
        "overflows",
        "other_overflows",
        "underflow",
        "block_norm",
        "compression_error",
        "sent_megabytes",
        "dense_megabytes",
    ),
    "data": (
        "epoch",
        "captions_cut",
        "captions_empty",
        "epoch_captions_cut",
        "epoch_captions_empty",
        "samples_corrupt",
        "shards_quarantined",
    ),
}
OTHER = "other"  # the group of what no group names
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def tagged(numbers: Mapping[str, float | list[float]]) -> Iterator[tuple[str, float]]:
    """Tag and number: GROUP/NAME; of a list, one per resblock: GROUP/NAME/000 and so on."""
    for name, number in single(numbers):
        yield f"{_GROUP_OF.get(name.split('/')[0], OTHER)}/{name}", number


def single(numbers: Mapping[str, float | list[float]]) -> Iterator[tuple[str, float]]:
    """Name and number; of a list, one per resblock: NAME/000 and so on."""
    for name, value in numbers.items():
        if isinstance(value, list):
            yield from ((f"{name}/{block:03d}", number) for block, number in enumerate(value))
        else:
            yield name, value
