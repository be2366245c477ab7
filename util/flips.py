"""How often objects change their query from one evaluation to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from util import dist
from util.structures import Target


class Flips:
    """Remembers the queries of the objects on the first images of an evaluation until the next one.

    An unstable assignment teaches a query another object every epoch. Nothing of it is stored: the first evaluation
    after a resume has no number. In a two-stage detector a query is a rank among the proposals, so a new order of the
    proposals counts too: compare matchers, not detectors.

    Args:
        images: how many, of all processes together.
    """

    def __init__(self, images: int = 256) -> None:
        self.images = images
        self._before: dict[int, list[int]] = {}  # by image id
        self._now: dict[int, list[int]] = {}

    def see(self, targets: Sequence[Target], chosen: Tensor) -> None:
        """Note a batch; waits for the device, but only while there are too few images.

        Args:
            targets: of the batch.
            chosen: (M,) int64, the query of each object, one image after the other; -1 = none.
        """
        if len(self._now) >= max(self.images // dist.world_size(), 1):
            return
        for target, slots in zip(targets, chosen.cpu().split([len(t) for t in targets])):
            self._now[target.image_id] = slots.tolist()

    def finish(self) -> dict[str, float]:
        """End the evaluation; a collective.

        Returns:
            `flip`: share of the objects whose query is another one than last time (to lose or to get one counts);
            nothing in the first evaluation or if there are no objects.
        """
        known = self._before.keys() & self._now.keys()
        changes = [a != b for image in known for a, b in zip(self._before[image], self._now[image], strict=True)]
        self._before, self._now = self._now, {}
        parts = dist.gather_objects((sum(changes), len(changes)))
        changed, count = (sum(part[i] for part in parts) for i in (0, 1))
        return {"flip": changed / count} if count else {}
