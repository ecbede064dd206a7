"""What tests of the trainers share: a folder of pictures, and the log that a run leaves."""

import json
import os

from lfp_jax import images, logs


def write_pictures(folder, pictures, *, labels, choices):
    """Write uint8 pictures as toon_head.mjs does, every tenth held out; the folder as text."""
    os.makedirs(folder / "images" / "000", exist_ok=True)
    rows = []
    for i, (u8, chosen) in enumerate(zip(pictures, labels, strict=True)):
        file = f"images/000/{i:06d}.png"
        images.write_png(str(folder / file), u8)
        split = "held_out" if i % 10 == 9 else "train"
        rows.append(json.dumps({"file": file, "split": split, "labels": chosen}))
    (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "labels.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def write_plain_pictures(folder, pictures):
    """Write pictures of which nothing is asked but that they have some label."""
    labels = [{"hair": i % 2} for i in range(len(pictures))]
    return write_pictures(folder, pictures, labels=labels, choices={"hair": ["bun", "spiky"]})


def log_lines(folder):
    """Read log.jsonl, without what differs from run to run: times and rates."""
    return [
        {k: v for k, v in line.items() if k != "time" and not k.endswith("_per_second")}
        for line in logs.read_lines(folder / "log.jsonl")
    ]
