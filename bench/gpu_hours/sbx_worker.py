"""sbx's PPO as a worker in an interpreter of its own: one iteration per line read, one line of JSON per iteration.

python -m bench.gpu_hours.sbx_worker '{"task": "push", ...}'
"""

import json
import sys
from dataclasses import asdict

from sbx import PPO

from bench.gpu_hours.accounting import measured
from bench.gpu_hours.rungs import make_env
from bench.gpu_hours.work import Work


def main() -> None:
    settings = json.loads(sys.argv[1])
    work = Work(**{**settings, "net_arch": tuple(settings["net_arch"])})
    keywords = work.ppo()
    del keywords["device"]  # JAX places its arrays itself
    model = PPO("MlpPolicy", make_env(work), **keywords)
    for _ in sys.stdin:
        before = model.num_timesteps
        with measured() as cost:
            model.learn(1, log_interval=1000, reset_num_timesteps=before == 0)
        print(json.dumps({"cost": asdict(cost()), "env_steps": model.num_timesteps - before}), flush=True)


if __name__ == "__main__":
    main()
