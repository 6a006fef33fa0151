import dataclasses

import numpy as np
import tiny_run
import torch

from dalle_dist.config import SamplingConfig
from dalle_dist.data.labelled_grid import GAP
from dalle_dist.dvae.model import DVAE
from dalle_dist.generate.grid import sample_grid
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.text_tokenizer.bpe import train_tokenizer
from dalle_dist.transformer.model import Transformer


def test_samples_are_made_by_the_options_of_the_config(tmp_path):
    config = tiny_run.make(tmp_path)
    tokenizer = train_tokenizer(tiny_run.CAPTIONS, config.tokenizer.vocab_size)
    model, dvae = Transformer(config).eval(), DVAETokenizer(DVAE(config.dvae))

    def samples(**options):
        """The two images of the prompt."""
        shown = dataclasses.replace(config, sampling=SamplingConfig(**options))
        image = np.asarray(sample_grid(model, dvae, tokenizer, shown, torch.device("cpu")))
        row = image[-96 - GAP : -GAP, GAP:]
        return row[:, :96], row[:, 96 + GAP : 2 * 96 + GAP]

    assert np.array_equal(*samples(temperature=0))
    assert not np.array_equal(*samples())


def test_each_prompt_stands_above_its_row(tmp_path):
    config = tiny_run.make(tmp_path)
    tokenizer = train_tokenizer(tiny_run.CAPTIONS, config.tokenizer.vocab_size)
    model, dvae = Transformer(config).eval(), DVAETokenizer(DVAE(config.dvae))

    def drawn(*prompts):
        train = dataclasses.replace(config.train, prompts=list(prompts))
        shown = dataclasses.replace(config, train=train)
        return sample_grid(model, dvae, tokenizer, shown, torch.device("cpu"))

    one, two = drawn("red heart"), drawn("red heart", "blue car")
    assert two.width == one.width
    above = np.asarray(one)[: one.height - 96 - 2 * 6]
    assert (above < 128).any() and above.shape[0] >= 11
    # The second row lies below the first and has as much room; its words are other ones.
    below = np.asarray(two)[two.height - one.height : two.height - 96 - 2 * 6]
    assert (below < 128).any() and not np.array_equal(below, above)
