"""Which mixer and which feed-forward stand in which block: the one place that knows all kinds.

A mixer takes (x_btm, sight, cache) and lets positions look at each other; a feed-forward takes
x_btm and works on each position alone. A new kind is a file of its own and a line here.
"""

from __future__ import annotations

from torch import nn

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.experts import Experts
from llm_from_scratch.model.layers import Attention, FeedForward


def make_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """What mixes positions in block number `layer`."""
    return Attention(config, window=layer in config.window_layers)


def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """What works on each position in block number `layer`."""
    if config.experts is not None and layer in config.experts.layers:
        return Experts(config)
    return FeedForward(config)
