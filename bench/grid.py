"""The real thing: pretrained transformers extract the whole of GRID, and a teacher learns from what they say.

    python bench/grid.py [--shared ../shared] [--clips 1000] [--precision float32] [--epochs 30] [--folder DIR]

DINOv2 ViT-S/14 looks at ten frames of the mouth, and at the flow between them, at 84 pixels; Whisper tiny.en hears the
sentence.  Runs `karmma extract`, `extract` again, `cache verify` and `train-teacher`, each as a user would, and prints
the seconds of each, the states, and the teacher's accuracy on validation.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = """
[data]
table = "clips.csv"
media = "{shared}/data/grid"
heads = ["verb", "colour"]
modalities = ["video", "flow", "audio"]
frames = 10
size = 84
crop_box = [115, 165, 211, 261]
center_crop = 1.0
flow_size = 84
audio_segment_s = 0.3
audio_hop = 160
audio_steps = 30
audio_mels = 80
audio_window = 400
audio_fft = 400

[extract]
theta = 180  # pairs of patches; Whisper's 150 tokens stay as they are
shard_rows = 64
precision = "{precision}"
video = {{name = "timm:vit_small_patch14_dinov2", weights = "{shared}/weights/vit_small_patch14_dinov2.safetensors"}}
flow = {{name = "timm:vit_small_patch14_dinov2", weights = "{shared}/weights/vit_small_patch14_dinov2.safetensors"}}
audio = {{name = "hf:{shared}/weights/whisper_tiny_en_encoder", weights = "pretrained"}}

[teacher]
embed_dim = 192
ffn_dim = 192
n_attention_heads = 4
norm_first = true
epochs = {epochs}
warmup_epochs = 3
max_lr = 1e-3
"""


def karmma(folder: Path, *words: str) -> tuple[float, str]:
    """Run a command; return its seconds and what it said.  Raises SystemExit if it fails."""
    code = "import sys; from karmma.cli import main; sys.argv[0] = 'karmma'; main()"
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *words]
    found = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"karmma {' '.join(words)}: exit code {found.returncode}")
    return time.perf_counter() - start, found.stdout


def main() -> None:
    """Write the settings, run the commands and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("KARMMA_SHARED", "../shared")))
    parser.add_argument("--clips", type=int, default=1000, help="so many, spread over the table")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where cache and runs are written, and left")
    asked = parser.parse_args()
    shared = asked.shared.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with open(shared / "data/grid/clips.csv", newline="", encoding="utf-8") as file:
            header, *all_rows = csv.reader(file)
        rows = [header, *all_rows[:: max(1, len(all_rows) // asked.clips)][: asked.clips]]
        with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        settings = SETTINGS.format(shared=shared, precision=asked.precision, epochs=asked.epochs)
        (folder / "karmma.toml").write_text(settings)
        for words in (["extract"], ["extract"], ["cache", "verify"], ["cache", "info"], ["train-teacher"]):
            seconds, said = karmma(folder, *words)
            print(f"$ karmma {' '.join(words)}: {seconds:.1f} s")
            print(re.sub(r"(?m)^", "  ", said.rstrip()))


if __name__ == "__main__":
    main()
