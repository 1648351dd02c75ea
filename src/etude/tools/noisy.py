"""A tool whose replies are noisy: what the model reads of them is changed on the way.

The contract stays: the time-out, the cap on what is shown and the rule that a tool's text is data hold for
the changed reply as they do for any. Failures are passed on as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etude.data.noise import Noise
from etude.math.counters import mix, word_of
from etude.protocols import Tool
from etude.tools.contract import to_text


class NoisyTool:
    """A tool behind a noise.

    The same question is answered in the same way, whoever asks: the change depends on the seed, the tool's
    name and the arguments.

    Args:
        tool: what answers.
        noise: changes its reply.
        seed: of the changes.
    """

    def __init__(self, tool: Tool, noise: Noise, seed: int) -> None:
        self.tool = tool
        self.noise = noise
        self.seed = seed
        self.name = tool.name
        self.description = tool.description
        self.schema = tool.schema

    async def __call__(self, arguments: str | Mapping[str, Any]) -> str:
        reply = to_text(await self.tool(arguments))
        asked = json.dumps([self.name, arguments], sort_keys=True, default=str)
        return self.noise(reply, mix(self.seed, word_of(asked)))
