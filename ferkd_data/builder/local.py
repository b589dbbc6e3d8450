"""The engine of one process: the shards one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ferkd_data.builder.labelling.forwards import Nobody
from ferkd_data.builder.labelling.label_shard import Tools
from ferkd_data.builder.labelling.write_behind import WriteBehind
from ferkd_data.builder.out.state import BuildFolder
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.watch.progress import ProgressCounter


def label_here(
    folder: BuildFolder, plan: Plan, tools: Tools, shards: Sequence[int], counter: ProgressCounter, stop: Stop
) -> None:
    counter.worker_started(0, tools.device)
    with WriteBehind(folder, plan, tools, counter.shard_done) as behind:
        for shard in shards:
            if stop.requested:
                behind.settle()
                raise stop.error()
            counter.shard_begun(shard)

            def on_batch(crops: int, rejects: int, shard: int = shard) -> None:
                counter.batch(shard, crops, rejects)
                if stop.expired:
                    raise stop.error()

            behind.label(shard, on_batch)
            counter.worker_idle(0)
        behind.settle()


class Reporting(Nobody):
    """Passes on what the teachers of this process are at, as far as anybody wants to know."""

    def __init__(self, counter: ProgressCounter) -> None:
        self.counter = counter

    def halved(self, teacher: str, crops: int) -> None:
        self.counter.halved(teacher, crops)
