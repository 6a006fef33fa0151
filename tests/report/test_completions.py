"""The report's completions: its figures are the measure's, its table shows true and completed."""

import torch
from tiny_generator import build, text

from dalle_dist.generate.request import sample_seed
from dalle_dist.metrics.completion import complete_images, completion_ranks
from dalle_dist.metrics.identification import summary
from dalle_dist.report.completions import completions
from dalle_dist.report.inputs import HeldOut


def held_out(generator):
    codes_BN = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))
    images_BCHW = (generator.image_tokenizer.decode(codes_BN).clamp(0, 1) * 255).byte()
    return HeldOut(["a red heart", "a blue car", "a cat"], images_BCHW, text(), codes_BN)


def test_figures_are_those_of_the_measure_with_and_without_what_is_given():
    generator = build("train.metrics=[completion]", "train.completion_rows=3")
    shown = held_out(generator)
    section, figures = completions(generator, shown, seed=7)
    seeds = [sample_seed(7, caption, 0) for caption in shown.captions]
    for rows, name in ((3, ""), (0, ", nothing given but the caption")):
        completed = complete_images(
            generator.model, generator.image_tokenizer, shown.text_BT, shown.codes_BN, seeds, rows
        )
        ranks = completion_ranks(completed, shown.images_BCHW.float() / 255, 3 / 4)
        assert figures[f"completion R@1{name}"] == round(summary(ranks)["r1"], 3)
    assert figures["images completed below their first 3 rows of tokens"] == 3
    assert section.heading == "Completed below the first 3 of 4 rows: true image, completion"
    assert section.image.width > 6 * 128 and section.image.getextrema() != ((255, 255),) * 3
