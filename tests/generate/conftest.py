import pytest
import tiny_run
import torch

from dalle_dist.checkpoint.release import save_release
from dalle_dist.config import from_dict, to_dict
from dalle_dist.transformer.model import Transformer


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """release(guidance=3): folder of a release whose config has this section `sampling`."""
    folder = tmp_path_factory.mktemp("releases")
    tree = to_dict(tiny_run.make(folder))
    tree["train"]["caption_dropout"] = 0.1
    torch.manual_seed(3)
    weights = {
        name: 0.3 * torch.randn(shape.shape)
        for name, shape in Transformer(from_dict(tree)).state_dict().items()
    }

    def make(**sampling):
        config = from_dict(tree | {"sampling": sampling})
        target = folder / "-".join(map(str, sampling.values())) / "release"
        dvae = f"{config.paths.dvae_run}/release"
        save_release(str(target), config, weights, config.paths.tokenizer, dvae)
        return str(target)

    return make
