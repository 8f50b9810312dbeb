"""The program, computing in float32 even where the processor has bfloat16, in which near neighbours change places.

With the environment's JOINT_STEPS it checkpoints after every step, and notes the joint training's steps there, a line
of process and step each; with KILLED_AT, "PROCESS STEP", that process ends itself before that step of them.
"""

import os
import signal
from pathlib import Path
from typing import Any

from tandemqa import processes
from tandemqa.cli import main
from tandemqa.encoders import backbone
from tandemqa.training import loop


def watched(whole: Any, noted: str) -> Any:
    def step(objective: Any, *arguments: Any) -> Any:
        if None not in (objective.model.retriever, objective.model.reranker):
            here = f"{processes.rank()} {arguments[-1]}"
            if here == os.environ.get("KILLED_AT"):
                os.kill(os.getpid(), signal.SIGKILL)
            with Path(noted).open("a") as file:
                file.write(here + "\n")
        return whole(objective, *arguments)

    return step


if __name__ == "__main__":
    backbone.has_bfloat16 = lambda device: False
    if noted := os.environ.get("JOINT_STEPS"):
        loop.CHECKPOINT_SECONDS = 0
        loop._step = watched(loop._step, noted)
    main()
