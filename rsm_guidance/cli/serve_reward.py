"""The command `serve-reward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from rsm_guidance.cli.options import check_reward, load_reward, quiet_libraries, say


@dataclass(frozen=True)
class ServeReward:
    """Score for other machines: their reward is remote:url=http://HOST:PORT.

    rsm-guidance serve-reward --port 8000 shapes-drm

    rsm-guidance serve-reward --host 0.0.0.0 hpsv2:dtype=float16:device=cuda:0

    There is no access control: whoever reaches the port can use it.
    """

    reward: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REWARD")]
    """A name (see `rsm-guidance rewards`), folder or hub id of a reward model, package.module:object, or "A + 0.5 * B"."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for other machines."""
    port: int = 8000
    """0 for any free one, which is printed."""

    def run(self) -> None:
        from rsm_guidance.rewards.serve import reward_server

        quiet_libraries()
        check_reward(self.reward)
        reward = load_reward(self.reward)
        with reward_server(reward, self.host, self.port) as server:
            say({"reward": reward.name, "url": f"http://{self.host}:{server.server_port}"})
            server.serve_forever()
