import pytest
import tiny_run

from dalle_dist.config import from_dict, to_dict


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """release(guidance=3): folder of a release whose config has this section `sampling`."""
    folder = tmp_path_factory.mktemp("releases")
    tree = to_dict(tiny_run.make(folder))
    tree["train"]["caption_dropout"] = 0.1

    def make(**sampling):
        config = from_dict(tree | {"sampling": sampling})
        target = folder / "-".join(map(str, sampling.values())) / "release"
        tiny_run.save_random_release(target, config)
        return str(target)

    return make
