"""The commands under `karmma cache`: what is in a cache, is it sound, and how it comes together and apart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from .cli_options import DAMAGED, SOME_FAILED, Settings, out, tell, tell_some, with_options
from .data.cache import Cache
from .data.errors import CacheError, nearest
from .data.inventory import StoreInfo, prune, take_inventory, unused
from .data.progress import watched
from .data.publish import remove
from .data.verify import Damage, count_shards
from .data.verify import verify as find_damage

cache_app = typer.Typer(help="Look at, verify, merge, adopt, prune, export and import caches.", no_args_is_help=True)

TOLERANCE = 1e-3  # of logits: float32 sums in other batches differ by some 1e-6
Json = Annotated[bool, typer.Option("--json", help="print one JSON value instead of a table")]


@cache_app.command("info")
@with_options("data.cache", needs_clips=False)
def info(*, settings: Settings, as_json: Json = False) -> None:
    """List every store: what it was made from, how large and how complete it is."""
    cache = Cache.open(settings.data.cache)
    stores = take_inventory(cache)
    if as_json:
        said = [{**asdict(store), "path": str(store.path(cache)), "complete": store.is_complete} for store in stores]
        whole = {"cache": str(cache.path), "clips": cache.n_clips, "stores": said}
        out.print(json.dumps(whole), soft_wrap=True, markup=False, highlight=False)
        return
    print_stores(stores, f"{cache.path}: {cache.n_clips} clips")


def print_stores(stores: list[StoreInfo], title: str) -> None:
    """Print one row a store."""
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("store", no_wrap=True)
    table.add_column("made from", overflow="fold")
    table.add_column("clips\npresent / absent / failed")
    table.add_column("size", no_wrap=True)
    for store in stores:
        states = " / ".join(str(store.counts.get(state, 0)) for state in ("present", "absent", "failed"))
        clips = "all" if store.is_complete else f"{store.n_current} of {store.n_due}"
        shape = " x ".join(map(str, store.shape[1:]))
        row = (f"{store.kind}\n{store.name}", f"{store.made_from}\n{shape}", f"{clips}\n{states}")
        table.add_row(*row, decimal(store.n_bytes))
    out.print(table)


@cache_app.command("verify")
@with_options("data.cache", "data.runs", needs_clips=False)
def verify(
    *,
    settings: Settings,
    logits: Annotated[
        bool, typer.Option("--logits", help="compute a sample of every teacher's logits again, from its tokens")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="clips of each view to compute again")] = 64,
    drop: Annotated[bool, typer.Option("--drop", help="forget damaged shards: extract makes them again")] = False,
) -> None:
    """Read every byte and compare checksums; names damaged files and their clips, and then exits with 4."""
    cache = Cache.open(settings.data.cache)
    n_shards = count_shards(cache)
    with watched("verify", n_shards, "shards") as progress:
        damage = list(find_damage(cache, progress.advance))
    for found in damage:
        out.print(str(found), soft_wrap=True, markup=False, highlight=False)
    if not damage:
        tell(f"{cache.path}: {n_shards} shards and all logits are sound.")
        if logits and not _agree(cache, settings.data.runs, sample):
            raise typer.Exit(DAMAGED)
        return
    if drop:
        _forget(cache, damage)
    else:
        tell(f"{len(damage)} damaged. Forget them with karmma cache verify --drop, then run karmma extract.")
    raise typer.Exit(DAMAGED)


def _forget(cache: Cache, damage: list[Damage]) -> None:
    """Take what is damaged for not there, and say how it is made again."""
    shards = {found.shard for found in damage if found.shard is not None}
    teachers = {found.logits for found in damage if found.logits is not None}
    for shard in shards:
        cache.drop_receipt(*shard)
    for teacher in teachers:
        remove(cache.logits_path(teacher))
    if shards:
        tell(f"{len(shards)} damaged shards count as not there now. Next: karmma extract")
    if teachers:
        tell(f"Removed logits of {', '.join(sorted(teachers))}. Next: karmma train-teacher, or import them again")


def _agree(cache: Cache, runs: Path, sample: int) -> bool:
    """Compute logits again and say how far they are off; False if that is more than rounding.

    Raises CacheError if there are none that can be computed again.
    """
    from .fuse.logits import recompute

    agree, n_teachers, n_checked = True, 0, 0
    for found in recompute(cache, runs, sample):
        n_teachers += 1
        if found.reason:
            tell(f"{found.teacher}: not computed again: {found.reason}.")
            continue
        n_checked += 1
        is_near = found.error <= TOLERANCE  # which NaN is not
        agree &= is_near
        said = "" if is_near else f" More than {TOLERANCE}: run karmma train-teacher again."
        text = f"{found.teacher}: {found.n_clips} clips computed again, largest difference {found.error:.1e}.{said}"
        out.print(text, soft_wrap=True, markup=False, highlight=False)
    if not n_checked:
        advice = "Name the folder of their runs with --runs." if n_teachers else "Run karmma train-teacher."
        raise CacheError(f"{cache.path}: of {n_teachers} teachers' logits none could be computed again. {advice}")
    return agree


@cache_app.command("merge")
@with_options("data.cache", needs_clips=False)
def merge(
    others: Annotated[list[str], typer.Argument(help="caches to take shards and logits from; they stay as they are")],
    *,
    settings: Settings,
) -> None:
    """Take over what other caches have and this one lacks; clips are joined by id."""
    from .data.transfer import merge as take_over

    cache = Cache(settings.data.cache)
    for other in others:
        taken = take_over(cache, Cache.open(other))
        for store, n in taken.items():
            tell(f"{other}: {n} clips of {store} taken")
    print_stores(take_inventory(cache), f"{cache.path}: {cache.n_clips} clips")


@cache_app.command("adopt")
@with_options("data", "extract")
def adopt(
    name: Annotated[str, typer.Argument(help="digest of the older tokens, as karmma cache info prints it")],
    *,
    settings: Settings,
    sample: Annotated[int, typer.Option(min=1, help="clips that are made anew and compared")] = 16,
) -> None:
    """Accept tokens of an older identity, once a sample made anew has turned out the same."""
    from .extract.adopt import adopt_tokens

    table, cache = settings.table(), Cache.open(settings.data.cache)
    found = adopt_tokens(cache, table, name, settings.data, settings.extract, sample)
    tell_some([f"differs: {change}" for change in found.changes])
    tell(
        f"{found.n_sampled} clips made anew: least cosine {found.least_cosine:.6f}, largest error "
        f"{found.largest_error:.3g}. {found.n_rows} rows of {name} are now {found.name}."
    )


@cache_app.command("prune")
@with_options("data.cache", "data.runs", needs_clips=False)
def remove_unused(
    *, settings: Settings, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False
) -> None:
    """Remove tokens and logits that no run refers to."""
    cache = Cache.open(settings.data.cache)
    doomed = unused(cache, take_inventory(cache), settings.data.runs)
    if not doomed:
        tell(f"Nothing to do: every store of {cache.path} is in use by a run in {settings.data.runs}.")
        return
    print_stores(doomed, f"in use by no run in {settings.data.runs}")
    if not yes and not typer.confirm(f"Remove {len(doomed)} stores?", err=True):
        tell("Nothing was removed.")
        return
    tell(f"Removed {len(doomed)} stores, {decimal(prune(cache, doomed))}.")


@cache_app.command("export")
@with_options("data.cache", "data.modalities", needs_clips=False)
def export(
    file: Annotated[Path, typer.Argument(help="HDF5 file to write")],
    *,
    settings: Settings,
    tokens: Annotated[list[str], typer.Option(help="digest of tokens, where a modality has several sets")] = [],  # noqa: B006
    teacher: Annotated[str | None, typer.Option(help="digest of the teacher whose logits go along")] = None,
) -> None:
    """Write tokens, and a teacher's logits, to one HDF5 file that anybody can read."""
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
    n_clips = export_tokens(cache, stores, teacher, file)
    tell(f"Wrote {file}: {', '.join(stores)} of {n_clips} clips{f', logits of {teacher}' if teacher else ''}.")


def _chosen(cache: Cache, modality: str, known: list[str], asked: list[str]) -> str:
    named = [name for name in known if name in asked] or known
    if len(named) > 1:
        said = ", ".join(named)
        raise CacheError(f"{cache.path}: {len(named)} sets of {modality} tokens: {said}. Choose with --tokens.")
    return named[0]


@cache_app.command("import")
@with_options("data", "extract.shard_rows")
def take_in(
    file: Annotated[Path, typer.Argument(help="HDF5 file of tokens or logits: docs/cache.md says how it looks")],
    *,
    settings: Settings,
    name: Annotated[str | None, typer.Option(help="what to call a teacher (default: the file's name)")] = None,
) -> None:
    """Take in features made elsewhere, to train a teacher on, or a foreign teacher's logits, to distil from."""
    from .data.exchange import import_logits, import_tokens
    from .data.foreign import open_foreign

    table, cache = settings.table(), Cache(settings.data.cache)
    failed: list[str] = []
    with open_foreign(file, table) as foreign:
        if foreign.n_unknown:
            tell(f"{foreign.n_unknown} clips of {file} are not in {table.path} and are left out.")
        for modality in foreign.modalities:
            digest, n_rows = import_tokens(cache, foreign, modality, settings.extract.shard_rows)
            tell(f"{modality}: {n_rows} rows are now tokens {digest}.")
            found = cache.failures(modality, digest, table.clip_ids)
            failed += [f"failed: {modality} of {clip_id}: {reason}" for clip_id, reason in found.items()]
        if foreign.has_logits:
            teacher, n_rows = import_logits(cache, foreign, name or file.stem)
            tell(f"{n_rows} logits are now teacher {teacher}. Next: karmma distill --teacher {teacher}")
    tell_some(failed)
    raise typer.Exit(SOME_FAILED if failed else 0)
