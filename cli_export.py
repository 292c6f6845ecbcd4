"""`karmma export`: a trained student for programs without KARMMA, or to be shared."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_options import Answer, Settings, chosen_student, out, tell, with_options, would
from .data.runs import RunFolder


@with_options("data.runs", needs_clips=False)
def export(
    run: Annotated[Path | None, typer.Argument(help="run folder of a student (default: the latest)")] = None,
    *,
    settings: Settings,
    kind: Annotated[
        Literal["torch", "onnx", "hub"],
        typer.Option("--format", help="torch.export program, ONNX, or a folder for the Hugging Face hub"),
    ] = "torch",
    output: Annotated[
        Path | None, typer.Option(help="file or folder (default: student.pt2, student.onnx or hub in the run)")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="of the weights, for the model card of hub")] = None,
) -> Answer:
    """Export a student that takes any subset of its modalities, and check it against the student.

    \b
    Examples:
      karmma export
      karmma export runs/student-1a2b3c4d --format onnx --output student.onnx
      karmma export runs/student-1a2b3c4d --format hub --license cc-by-nc-4.0
    """
    if licence and kind != "hub":
        raise typer.BadParameter("--license goes into a model card: it needs --format hub.")
    folder = chosen_student(settings, run)
    if settings.dry_run:
        return would(f"Would export {folder.path} as {kind} to {output or folder.path}", run=folder.path)
    if kind == "hub":
        from .distill.hub import save_student

        path = save_student(folder, output, licence)
        tell(f"Wrote {path}: model.safetensors, config.json and README.md. Next: read the latter, the model card.")
        return Answer({"run": folder.path, "path": path})
    return _exported(folder, kind, output)


def _exported(folder: RunFolder, kind: str, output: Path | None) -> Answer:
    """Export a program, and say how near it comes to the student."""
    from .distill.export import export_student

    report = export_student(folder, kind, output)
    if report.was_there:
        tell(f"Nothing to do: {report.path} was exported already.")
    size, found = report.path.stat().st_size / 1e6, report.agreement
    out.print(
        f"{report.path}: {size:.1f} MB, {found.n_clips} clips compared with the student, "
        f"largest difference of a logit {found.difference:.1e}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    wrote = "" if report.was_there else f"Wrote {report.path}. "
    tell(f"{wrote}Next: read {report.about}, its inputs, outputs and classes.")
    return Answer({"run": folder.path, "bytes": report.path.stat().st_size, **vars(report)})
