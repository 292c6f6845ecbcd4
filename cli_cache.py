"""The commands under `karmma cache`: what is in a cache, is it sound, and how it comes together and apart."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from .cli_exchange import export, take_in
from .cli_options import DAMAGED, Answer, Settings, out, tell, tell_some, with_options, would
from .data.cache import Cache
from .data.errors import CacheError
from .data.inventory import StoreInfo, prune, take_inventory, unused
from .data.progress import watched
from .data.publish import remove
from .data.verify import Damage, count_shards
from .data.verify import verify as find_damage

if TYPE_CHECKING:
    from .fuse.logits import Recomputed

cache_app = typer.Typer(help="Look at, verify, merge, adopt, prune, export and import caches.", no_args_is_help=True)
cache_app.command("export")(export)
cache_app.command("import")(take_in)

TOLERANCE = 1e-3  # of logits: float32 sums in other batches differ by some 1e-6


@cache_app.command("info")
@with_options("data.cache", needs_clips=False)
def info(*, settings: Settings) -> Answer:
    """List every store: what it was made from, how large and how complete it is.

    \b
    Examples:
      karmma cache info
      karmma cache info --cache s3://bucket/cache --json
    """
    cache = Cache.open(settings.data.cache)
    if settings.dry_run:
        return would(f"Would list the stores of {cache.path}", cache=cache.path)
    return _inventory(cache)


def _inventory(cache: Cache) -> Answer:
    """Print one row a store of a cache."""
    stores = take_inventory(cache)
    print_stores(stores, f"{cache.path}: {cache.n_clips} clips")
    said = [{**asdict(store), "path": store.path(cache), "complete": store.is_complete} for store in stores]
    return Answer({"cache": cache.path, "clips": cache.n_clips, "stores": said})


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
) -> Answer:
    """Read every byte and compare checksums; names damaged files and their clips, and then exits with 4.

    \b
    Examples:
      karmma cache verify
      karmma cache verify --drop
      karmma cache verify --logits --sample 256
    """
    cache = Cache.open(settings.data.cache)
    n_shards = count_shards(cache)
    if settings.dry_run:
        return would(f"Would read {n_shards} shards and all logits of {cache.path}", shards=n_shards)
    with watched("verify", n_shards, "shards") as progress:
        damage = list(find_damage(cache, progress.advance))
    for found in damage:
        out.print(str(found), soft_wrap=True, markup=False, highlight=False)
    answer = {"cache": cache.path, "shards": n_shards, "damage": damage}
    if not damage:
        tell(f"{cache.path}: {n_shards} shards and all logits are sound.")
        again = _agree(cache, settings.data.runs, sample) if logits else []
        return Answer({**answer, "logits": again}, 0 if all(_is_near(found) for found in again) else DAMAGED)
    if drop:
        _forget(cache, damage)
    else:
        tell(f"{len(damage)} damaged. Forget them with karmma cache verify --drop, then run karmma extract.")
    return Answer(answer, DAMAGED)


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


def _agree(cache: Cache, runs: Path, sample: int) -> "list[Recomputed]":
    """Compute logits again and say how far they are off.

    Raises CacheError if there are none that can be computed again.
    """
    from .fuse.logits import recompute

    found = list(recompute(cache, runs, sample))
    for one in found:
        if one.reason:
            tell(f"{one.teacher}: not computed again: {one.reason}.")
            continue
        said = "" if _is_near(one) else f" More than {TOLERANCE}: run karmma train-teacher again."
        text = f"{one.teacher}: {one.n_clips} clips computed again, largest difference {one.error:.1e}.{said}"
        out.print(text, soft_wrap=True, markup=False, highlight=False)
    if all(one.reason for one in found):
        advice = "Name the folder of their runs with --runs." if found else "Run karmma train-teacher."
        raise CacheError(f"{cache.path}: of {len(found)} teachers' logits none could be computed again. {advice}")
    return found


def _is_near(found: "Recomputed") -> bool:
    return bool(found.reason) or found.error <= TOLERANCE  # which NaN is not


@cache_app.command("merge")
@with_options("data.cache", needs_clips=False)
def merge(
    others: Annotated[list[str], typer.Argument(help="caches to take shards and logits from; they stay as they are")],
    *,
    settings: Settings,
) -> Answer:
    """Take over what other caches have and this one lacks; clips are joined by id.

    \b
    Examples:
      karmma cache merge part1/cache part2/cache
      karmma cache merge s3://bucket/cache --cache ./cache
    """
    from .data.transfer import merge as take_over

    cache = Cache(settings.data.cache)
    if settings.dry_run:
        n_stores = {other: len(take_inventory(Cache.open(other))) for other in others}
        listed = ", ".join(f"{other} ({n} stores)" for other, n in n_stores.items())
        return would(f"Would take over into {cache.path} what it lacks of {listed}", stores=n_stores)
    for other in others:
        taken = take_over(cache, Cache.open(other))
        for store, n in taken.items():
            tell(f"{other}: {n} clips of {store} taken")
    answer = _inventory(cache)
    tell(f"Wrote {cache.path}. Next: karmma train-teacher --cache {cache.path}")
    return answer


@cache_app.command("adopt")
@with_options("data", "extract")
def adopt(
    name: Annotated[str, typer.Argument(help="digest of the older tokens, as karmma cache info prints it")],
    *,
    settings: Settings,
    sample: Annotated[int, typer.Option(min=1, help="clips that are made anew and compared")] = 16,
) -> Answer:
    """Accept tokens of an older identity, once a sample made anew has turned out the same.

    \b
    Examples:
      karmma cache adopt 1a2b3c4d5e6f7081 --sample 32
    """
    from .extract.adopt import adopt_tokens, modality_of

    table, cache = settings.table(), Cache.open(settings.data.cache)
    if settings.dry_run:
        modality_of(cache, name)
        return would(f"Would make {sample} clips anew and hold tokens {name} of {cache.path} against them")
    found = adopt_tokens(cache, table, name, settings.data, settings.extract, sample)
    tell_some([f"differs: {change}" for change in found.changes])
    tell(
        f"{found.n_sampled} clips made anew: least cosine {found.least_cosine:.6f}, largest error "
        f"{found.largest_error:.3g}. {found.n_rows} rows of {name} are now {found.name}. "
        "Next: karmma train-teacher"
    )
    return Answer(vars(found))


@cache_app.command("prune")
@with_options("data.cache", "data.runs", needs_clips=False)
def remove_unused(
    *, settings: Settings, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False
) -> Answer:
    """Remove tokens and logits that no run refers to.

    \b
    Examples:
      karmma cache prune --dry-run
      karmma cache prune --yes
    """
    cache = Cache.open(settings.data.cache)
    doomed = unused(cache, take_inventory(cache), settings.data.runs)
    answer = {"cache": cache.path, "unused": doomed, "freed_bytes": 0}
    if not doomed:
        tell(f"Nothing to do: every store of {cache.path} is in use by a run in {settings.data.runs}.")
        return Answer(answer)
    print_stores(doomed, f"in use by no run in {settings.data.runs}")
    if settings.dry_run:
        return would(f"Would remove {len(doomed)} stores of {cache.path}", unused=doomed)
    if not yes and not typer.confirm(f"Remove {len(doomed)} stores?", err=True):
        tell("Nothing was removed.")
        return Answer(answer)
    freed = prune(cache, doomed)
    tell(f"Removed {len(doomed)} stores, {decimal(freed)}.")
    return Answer({**answer, "freed_bytes": freed})
