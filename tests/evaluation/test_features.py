"""Feature networks: stand-ins with the call conventions of the files that cannot be downloaded."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dalle_dist.errors import ConfigError, DataError
from dalle_dist.evaluation.features import Classifier, ClipFeatures
from dalle_dist.evaluation.inception import Inception
from dalle_dist.evaluation.lpips import Lpips
from dalle_dist.evaluation.prepare import unstack


class Layers(nn.Module):
    """Features that tell apart mean, deviation and size of what they were given."""

    def forward(self, x):
        parts = [x.mean((1, 2, 3)), x.std((1, 2, 3)), torch.full([len(x)], float(x.shape[3]))]
        return torch.stack(parts, 1).repeat(1, 683)[:, :2048, None, None]


class StandIn(nn.Module):
    """The convention of `inception-2015-12-05.pt`: uint8 or floats of 0 to 255, of any size."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers((img.to(torch.float32) - 128) / 128).flatten(1)
        if return_features:
            return features
        logits = features[:, :1008]
        return (logits if no_output_bias else logits + 1.0 * torch.arange(1008)).softmax(1)


class Vgg(nn.Module):
    """The convention of `vgg16.pt`."""

    def forward(self, img, resize_images: bool = True, return_lpips: bool = False):
        x = img / 255 if return_lpips else img
        return (x.mean(dim=[2]) if not resize_images else x.mean(dim=[3])).flatten(1)


def saved(tmp_path, module):
    path = tmp_path / f"{type(module).__name__}.pt"
    torch.jit.script(module).save(str(path))
    return str(path)


def images(count=3, side=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def test_inception_is_called_by_its_convention(tmp_path):
    path = saved(tmp_path, StandIn())
    network, x = Inception(path), images()
    assert network.fingerprint == hashlib.sha256((tmp_path / "StandIn.pt").read_bytes()).hexdigest()
    assert (network.figure, network.name) == ("FID", "Inception, tf1-bilinear")
    features = network.features(x)
    assert features.shape == (3, network.dim) and features.dtype == torch.float32
    mapped = (x.float() - 128) / 128
    torch.testing.assert_close(features[:, 0], mapped.mean((1, 2, 3)))
    assert features[:, 2].tolist() == [40] * 3, "the file resizes by itself"
    probabilities = network.probabilities(x)
    torch.testing.assert_close(probabilities, features[:, :1008].softmax(1))
    assert isinstance(network, Classifier)


def test_pillow_resizes_before_the_layers(tmp_path):
    network, x = Inception(saved(tmp_path, StandIn()), "pillow-bicubic"), images()
    features = network.features(x)
    assert features[:, 2].tolist() == [299] * 3
    flat = Inception(saved(tmp_path, StandIn()), "pillow-bicubic").features(
        torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    )
    assert flat[0, 0] == pytest.approx((200 - 128) / 128)
    resized = [
        Image.fromarray(plane.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
        for plane in x[0]
    ]
    assert max(np.asarray(plane).max() for plane in resized) > 255, "not rounded and not clipped"
    first = (torch.stack([torch.from_numpy(np.array(plane)) for plane in resized]) - 128) / 128
    assert features[0, :2].tolist() == pytest.approx([first.mean().item(), first.std().item()])
    assert features[1, 1] != pytest.approx(first.std().item(), rel=1e-6)
    torch.testing.assert_close(network.probabilities(x), features[:, :1008].softmax(1))
    assert network.name == "Inception, pillow-bicubic"


def test_what_is_not_inception_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(DataError, match="no such file"):
        Inception(str(path))
    path.write_bytes(b"not a network")
    with pytest.raises(DataError, match="not a TorchScript file"):
        Inception(str(path))
    with pytest.raises(ConfigError, match="resize=nearest: one of tf1-bilinear, pillow-bicubic"):
        Inception(str(path), "nearest")
    other = saved(tmp_path, Vgg())
    with pytest.raises(DataError, match="is not called like") as refusal:
        Inception(other).features(images())
    assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match="has no `layers`"):
        Inception(other, "pillow-bicubic")


def test_lpips_is_the_squared_distance_of_what_the_file_answers(tmp_path):
    lpips = Lpips(saved(tmp_path, Vgg()))
    a, b = images().float() / 255, images().flip(0).float() / 255
    expected = (a.mean(2) - b.mean(2)).double().square().sum((1, 2))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-5, atol=0)
    assert lpips(a, a).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="is not called like"):
        Lpips(saved(tmp_path, StandIn()))(a, b)


class Encoder:
    def image_features(self, images):
        assert all(image.mode == "RGB" for image in images)
        return torch.stack([torch.from_numpy(np.array(i)[0, :2, 0]).double() for i in images])


def test_clip_features_are_not_called_fid():
    x = images()
    clip = ClipFeatures(Encoder(), "ViT-B/32", "ab", dim=2)
    assert clip.figure == "FD (CLIP)" and not isinstance(clip, Classifier)
    assert clip.features(x).equal(x[:, 0, 0, :2].float())
    with pytest.raises(DataError, match=r"ViT-B/32: gave \(3, 2\) where \(3, 5\)"):
        ClipFeatures(Encoder(), "ViT-B/32", "ab", dim=5).features(x)
    assert np.array_equal(np.asarray(unstack(x)[1]), x[1].permute(1, 2, 0).numpy())
