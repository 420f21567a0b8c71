"""Train online: events arrive as files, are predicted and then learned from, and a server takes the newest model.

`python examples/online.py` makes up its events; in production another process writes the files, and another one serves.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor, nn

import matta
from matta.streams import Categorical, Encoder, Folder, Numeric, Schema, Stream

SCHEMA = Schema(columns={"shop": Categorical(vocabulary=40), "price": Numeric(low=0)}, label="bought", time="time")
REQUEST = {"shop": "shop 3", "price": 1.0}


class Ranker(nn.Module):
    """The model to serve; the Teaching Assistant is the same, built wider."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        (rows,) = SCHEMA.num_ids
        self.shop = nn.Embedding(rows, 4)
        self.mlp = nn.Sequential(nn.Linear(4 + SCHEMA.num_numbers, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, categorical: Tensor, numeric: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.shop(categorical[:, 0]), numeric], dim=-1)).squeeze(-1)


def write_events(folder: Path) -> None:
    """What another system does: a file an hour, new shops among them, and now and then a row that is broken."""
    dice = random.Random(0)
    for hour in range(20):
        with (folder / f"{hour:02}.jsonl").open("w") as file:
            for second in range(400):
                shop, price = dice.randrange(10 + hour), dice.expovariate(1.0)
                bought = dice.random() < (0.9 if shop % 3 == 0 and price < 1.5 else 0.1)
                event = {"shop": f"shop {shop}", "price": price, "bought": int(bought), "time": 3600 * hour + second}
                file.write(json.dumps(event if second else {**event, "price": "a bargain"}) + "\n")
    (folder / "_END").touch()


def serve(published: Path, is_over: threading.Event) -> None:
    """What a server does: swap in each new version, and answer."""
    latest, served = published / "latest", ""
    while not is_over.wait(0.01) or (latest.exists() and latest.read_text() != served):
        if latest.exists() and (newest := latest.read_text()) != served:
            snapshot, served = matta.read_snapshot(published, Ranker), newest
            encoder = Encoder.from_state(snapshot.encoder or {})
            with torch.no_grad():
                chance = torch.sigmoid(snapshot.module(**encoder.encode([REQUEST]))).item()
            print(f"version {snapshot.version}, after {snapshot.events} events: shop 3 sells with {chance:.0%}")


def main() -> None:
    """Train while files arrive; a thread each writes them and serves."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        events, published, is_over = Path(name, "events"), Path(name, "published"), threading.Event()
        events.mkdir()
        stream = Stream(Folder(events, poll_s=0.01), SCHEMA, batch_size=64, quarantine=Path(name, "bad.jsonl"))
        nested = matta.nest(Ranker(), Ranker(width=32))
        validation = matta.ProgressiveValidation(window=2000)
        snapshots = matta.Snapshots(published, every_events=1600, encoder=stream.encoder)
        threading.Thread(target=write_events, args=(events,), daemon=True).start()
        server = threading.Thread(target=serve, args=(published, is_over), daemon=True)
        server.start()
        matta.fit(
            matta.CoTraining(nested, matta.objectives.Binary(), ramp=matta.Ramp(start=0, steps=50)),
            stream,
            matta.Shampoo(nested, lr=0.1, graft="adagrad"),
            observers=[validation, snapshots],
            run=Path(name, "run"),  # killed and started again with resume=True, it would continue after the last event
            progress=False,
        )
        snapshots.publish(nested)
        is_over.set()
        server.join()
        for model, values in validation.window().items():
            print(f"{model}: AucLoss {values['auc_loss']:.3f} of the last 2,000 events, before learning from them")
        print(f"{stream.counts.events} events, {stream.counts.bad_rows} rows set aside")


if __name__ == "__main__":
    main()
