"""`karmma cache export` and `import`: tokens and logits as one HDF5 file, out of a cache and into one."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import SOME_FAILED, Answer, Settings, tell, tell_some, with_options, would
from .data.cache import Cache
from .data.errors import CacheError, nearest


@with_options("data.cache", "data.modalities", needs_clips=False)
def export(
    file: Annotated[Path, typer.Argument(help="HDF5 file to write")],
    *,
    settings: Settings,
    tokens: Annotated[list[str], typer.Option(help="digest of tokens, where a modality has several sets")] = [],  # noqa: B006
    teacher: Annotated[str | None, typer.Option(help="digest of the teacher whose logits go along")] = None,
) -> Answer:
    """Write tokens, and a teacher's logits, to one HDF5 file that anybody can read.

    \b
    Examples:
      karmma cache export tokens.h5
      karmma cache export audio.h5 --modality audio --teacher 1a2b3c4d5e6f7081
    """
    from .data.exchange import export_tokens

    cache = Cache.open(settings.data.cache)
    known = {name for _, name in cache.all_identities()}
    for unknown in set(tokens) - known:
        raise CacheError(f"{cache.path}: no tokens {unknown!r}. {nearest(unknown, known)}")
    begun = {m: [name for name in cache.identities(m) if cache.n_views(m, name)] for m in settings.data.modalities}
    stores = {modality: _chosen(cache, modality, names, tokens) for modality, names in begun.items() if names}
    if not stores and teacher is None:
        asked = ", ".join(settings.data.modalities)
        raise CacheError(f"{cache.path}: no tokens of {asked} here. Name others with --modality, or a --teacher.")
    what = ", ".join([*stores, *([f"logits of {teacher}"] if teacher else [])])
    if settings.dry_run:
        return would(f"Would write {what} of {cache.path} to {file}", tokens=stores, teacher=teacher)
    n_clips = export_tokens(cache, stores, teacher, file)
    tell(f"Wrote {file}: {what} of {n_clips} clips.")
    return Answer({"file": file, "tokens": stores, "teacher": teacher, "clips": n_clips})


def _chosen(cache: Cache, modality: str, known: list[str], asked: list[str]) -> str:
    named = [name for name in known if name in asked] or known
    if len(named) > 1:
        said = ", ".join(named)
        raise CacheError(f"{cache.path}: {len(named)} sets of {modality} tokens: {said}. Choose with --tokens.")
    return named[0]


@with_options("data", "extract.shard_rows")
def take_in(
    file: Annotated[Path, typer.Argument(help="HDF5 file of tokens or logits: docs/cache.md says how it looks")],
    *,
    settings: Settings,
    name: Annotated[str | None, typer.Option(help="what to call a teacher (default: the file's name)")] = None,
) -> Answer:
    """Take in features made elsewhere, to train a teacher on, or a foreign teacher's logits, to distil from.

    \b
    Examples:
      karmma cache import tokens.h5
      karmma cache import teacher.h5 --name their-teacher
    """
    from .data.exchange import import_logits, import_tokens
    from .data.foreign import open_foreign

    table, cache = settings.table(), Cache(settings.data.cache)
    failed: list[str] = []
    taken: dict[str, str] = {}
    with open_foreign(file, table) as foreign:
        if settings.dry_run:
            what = [*foreign.modalities, *(["logits"] if foreign.has_logits else [])]
            said = f"Would take {', '.join(what)} of {file} into {cache.path} but {foreign.n_unknown} unknown clips"
            return would(said, tokens=foreign.modalities, logits=foreign.has_logits, unknown=foreign.n_unknown)
        if foreign.n_unknown:
            tell(f"{foreign.n_unknown} clips of {file} are not in {table.path} and are left out.")
        for modality in foreign.modalities:
            digest, n_rows = import_tokens(cache, foreign, modality, settings.extract.shard_rows)
            taken[modality] = digest
            tell(f"{modality}: {n_rows} rows are now tokens {digest}. Next: karmma train-teacher")
            found = cache.failures(modality, digest, table.clip_ids)
            failed += [f"failed: {modality} of {clip_id}: {reason}" for clip_id, reason in found.items()]
        if foreign.has_logits:
            teacher, n_rows = import_logits(cache, foreign, name or file.stem)
            taken["logits"] = teacher
            tell(f"{n_rows} logits are now teacher {teacher}. Next: karmma distill --teacher {teacher}")
    tell_some(failed)
    return Answer({"file": file, "taken": taken, "failed": failed}, SOME_FAILED if failed else 0)
