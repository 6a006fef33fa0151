"""Two steps of training on a release, as the engine takes them but without it."""

import torch

from dalle_dist.checkpoint.release import load_release
from dalle_dist.transformer.loss_model import loss_transformer


def assert_loss_falls(release, caption):
    loaded = load_release(release)
    shape, model = loaded.config.transformer, loss_transformer(loaded.config)
    model.load_state_dict(loaded.transformer.state_dict())
    text, _ = loaded.tokenizer.encode_padded(caption, shape.text_tokens)
    text_BT, codes_BN = torch.tensor([text]), torch.randint(20, (1, shape.image_tokens))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for _ in range(3):
        sums = model(text_BT, codes_BN)
        loss = sums[0] / sums[1] + sums[2] / sums[3]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
