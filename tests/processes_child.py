"""What the processes of test_processes.py do. As a script: copies that agree, or fail, or wait to be ended."""
import json
import os
import sys
import time
from pathlib import Path

from facebook_nb import processes as P
from facebook_nb.files import UserError


def agree() -> dict:
    """Everything that processes tell each other, called before anybody joined."""
    import numpy as np
    import torch

    rank, found = int(os.environ["RANK"]), {}
    found["first"] = P.first({"rank": rank, "big": np.arange(6.0).reshape(2, 3).T, "empty": np.zeros((0, 2))})
    found["first"]["big"] += 1                  # each has its own
    found["first"] = {k: v if k == "rank" else v.tolist() for k, v in found["first"].items()}
    found["everyone"] = P.everyone("abc"[rank])
    found["share"] = [*P.share(10)]
    rows = np.arange(20).reshape(10, 2)[P.share(10)]
    found["gathered"] = P.gather_rows(rows).tolist()
    found["uneven"] = P.gather_rows(torch.full((rank, 2), rank, dtype=torch.float16)).tolist()
    found["none"] = list(P.gather_rows(np.zeros((0, 4), bool)).shape)
    found["parts"] = P.in_parts(7, lambda rows: np.full((len(rows), 1), rank), size=2).ravel().tolist()
    try:
        P.gather_rows(np.zeros((1, rank)))
    except ValueError as error:
        found["kinds"] = str(error)[:40]
    found["asked"] = P.ask_first(os.getpid) == P.first(os.getpid())
    try:
        P.ask_first(_gone)
    except UserError as error:
        found["error"] = [str(error), error.told]
    P.wait_for_all()
    return found | {"rank": P.rank(), "count": P.count(), "main": P.is_main()}


def _gone():
    raise UserError("list.csv: no such file; look again")


def sharded(folder: Path) -> list:
    """A training with a sharded head, kept in `folder`: digests of its weights at the end, and of its losses."""
    import torch.distributed as dist

    from facebook_nb.files import tensors_digest
    from facebook_nb.training import fit
    from tests import training_child as child

    P.join("cpu")
    args, more = child.sharded(dist.get_rank(), dist.get_world_size(), steps=12, checkpoint_every=1)
    history = fit(*args, folder=folder, device="cpu", **more)
    return [tensors_digest(args[0].state_dict()), history.losses["loss"]]


def outcome(name: str):
    """A job of `cli.on_all_cores`; one of them dies."""
    from facebook_nb.cli import Outcome

    if name == "dies":
        os.kill(os.getpid(), 9)
    return Outcome(name, float(os.getpid()))


if __name__ == "__main__":
    P.end_with_parent()
    place, what = Path(sys.argv[1], os.environ["RANK"]), sys.argv[2]
    place.write_text(json.dumps(agree()) if what == "agree" else str(os.getpid()))
    if what == "wait":
        time.sleep(60)
    sys.exit(2 * (what == "fail" and os.environ["RANK"] == "1"))
