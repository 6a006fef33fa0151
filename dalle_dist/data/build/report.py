"""What a finished build says: samples, formats, and each reason for which files were not used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from dalle_dist import storage
from dalle_dist.data.build.folder import Skipped
from dalle_dist.data.build.plan import PARTS, Plan
from dalle_dist.data.shard_job import Record
from dalle_dist.errors import DataError

SKIPPED = "skipped.jsonl"
NAMED = 20  # files not used that are named one by one; the rest are in `SKIPPED` alone


class Report:
    """Of the records of a job whose units are those of `plan`."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        self._plan = plan
        self._formats, self.used = Counter[str](), dict.fromkeys(PARTS, 0)
        self.skipped: Skipped = list(plan.skipped)
        for unit, record in zip(plan.units, records, strict=True):
            self.used[unit.part] += record.note["used"]
            self._formats.update(record.note["formats"])
            self.skipped += [(name, reason) for name, reason in record.note["skipped"]]

    def check(self, source: str, fix: str) -> None:
        """Raises DataError where a part has no sample; `fix` is what helps then."""
        if all(self.used.values()):
            return
        usable = sum(self.used.values())
        why = "".join(f"; {count} skipped: {reason}" for reason, count, _ in self._reasons())
        raise DataError(
            f"{source}: {usable} images can be used, {self.used['train']} to train on and "
            f"{self.used['held-out']} to hold out{why}; {fix if usable > 1 else 'add images'}"
        )

    def write_skipped(self, out: str) -> None:
        lines = [json.dumps({"file": name, "reason": reason}) for name, reason in self.skipped]
        storage.write_bytes(storage.join(out, SKIPPED), "".join(f"{x}\n" for x in lines).encode())

    def print(self, out: str) -> None:
        for name, reason in self.skipped[:NAMED]:
            print(f"skipped {name}: {reason}")
        if len(self.skipped) > NAMED:
            print(f"{len(self.skipped) - NAMED} more are named in {storage.join(out, SKIPPED)}")
        for name in self._plan.linked:
            print(f"followed the link {name}")
        for name, count, example in self._rows():
            print(f"  {count:>9}  {name}{f', e.g. {example}' if example else ''}")
        used = self.used
        print(f"{out}: {used['train']} images to train on, {used['held-out']} held out")

    def _rows(self) -> list[tuple[str, int, str]]:
        rows = [("to train on", self.used["train"], ""), ("held out", self.used["held-out"], "")]
        rows += [(f"of format {name}", n, "") for name, n in self._formats.most_common()]
        if self._plan.captions:
            rows.append(("caption files", self._plan.captions, ""))
        return rows + [(f"skipped: {r}", count, name) for r, count, name in self._reasons()]

    def _reasons(self) -> list[tuple[str, int, str]]:
        """Reason, count and one file of each, the most frequent first; details left out."""
        counts, examples = Counter[str](), dict[str, str]()
        for name, reason in self.skipped:
            kind = reason.partition(": ")[0]
            counts[kind] += 1
            examples.setdefault(kind, name)
        return [(kind, count, examples[kind]) for kind, count in counts.most_common()]
