"""`qtool quantize`: a checkpoint and a recipe in, a packed checkpoint and its report out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qtool.cli import options, state
from qtool.cli.console import Console
from qtool.errors import UsageError
from qtool.finishing import FINISHES, get_finish
from qtool.formats import FORMATS
from qtool.methods import METHODS, get_method
from qtool.recipe import AUTO, DEFAULT_IGNORE, Recipe, build, load_tree, section, set_key, to_tree, to_yaml
from qtool.transforms import TRANSFORMS, get_transform


def command(
    context: typer.Context,
    model: options.Model,
    output: options.Output = None,
    recipe: options.RecipeFile = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help="w4a16, w3a16-g64-asym, w8a8, fp8-dynamic, nvfp4, mxfp4a16, nf4, llm-int8, ... or one of llama.cpp's "
            "mixes: q4_k_m, q3_k_s, q8_0, iq4_xs, f16, ...",
        ),
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            "--transform", metavar="NAME", help=f"Done to the weights before, in this order: {', '.join(TRANSFORMS)}."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"Which codes are chosen: {', '.join(METHODS)}.")
    ] = None,
    finish: Annotated[
        list[str] | None,
        typer.Option("--finish", metavar="NAME", help=f"Train what was rounded, in this order: {', '.join(FINISHES)}."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN=SCHEME", help="Another scheme for these layers; the last match wins."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="PATTERN", help="Leave these alone, besides the output head, norms and embeddings."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help=f"How the codes lie on disk: auto, {', '.join(FORMATS)}."),
    ] = None,
    kv: Annotated[
        str | None, typer.Option("--kv", help="Scales for a key/value cache of this type: fp8 or int8.", metavar="TYPE")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Calibration text: python-docs, a file, a folder, a data set id (org/name:config), or self: "
            "what the model writes by itself.",
        ),
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option(
            "--stats",
            help="Saved statistics instead of data: a folder of `qtool calibrate`, or an imatrix of llama.cpp.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Calibration rows (128; to train, 512).")] = None,
    seqlen: options.SeqLen = None,
    pack: options.Pack = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Which rows, when there are more than asked for (0).")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Measure before and after on this text.")
    ] = None,
    protocol: options.Protocol = None,
    max_ppl_increase: options.MaxPplIncrease = None,
    max_kl: options.MaxKl = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, such as gptq.damp=0.05.")
    ] = None,
    print_recipe: options.PrintRecipe = False,
    recommend: Annotated[
        bool,
        typer.Option(
            "--recommend", help="Say which recipe suits MODEL, and why; write nothing. `--data none`: without data."
        ),
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="With --recommend: what the card has, such as 24GB.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="With --recommend: vllm, sglang, transformers, bitsandbytes, llama.cpp (ollama, lmstudio).",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", metavar="NAME", help="With --recommend: ampere, h100, rtx4090, cpu, apple, ..."),
    ] = None,
    model_context: Annotated[
        int | None, typer.Option("--context", min=1, help="With --recommend --memory: tokens per sequence (4096).")
    ] = None,
    requantize: Annotated[
        bool | None,
        typer.Option("--requantize", help="MODEL is quantized already: round it again, from what it is worth now."),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="A tensor left alone unasked is an error (no).")
    ] = None,
    device: options.Device = "auto",
    batch_tokens: options.BatchTokens = 512,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    progress: options.ShowProgress = True,
    log_format: options.LogFormat = "text",
) -> int:
    """Quantize MODEL into the folder OUT.

    Interrupted, the same command goes on where it stopped; done, it says so and changes nothing. A model that is
    quantized already is laid out anew in another --format, weight for weight.

    \b
    qtool quantize ./llama -o ./llama-w4 --scheme w4a16 --data code.jsonl
    qtool quantize ./llama -o ./llama-w4 --eval wiki.txt --max-ppl-increase 1%
    qtool quantize ./llama -o ./llama-fp8 --scheme fp8-dynamic --method rtn --kv fp8
    qtool quantize ./llama -o ./llama-gguf --scheme q4_k_m --data code.jsonl
    qtool quantize ./llama-awq -o ./llama-gptq --format gptq
    qtool quantize ./llama --recommend --engine vllm --memory 24GB
    """
    console = state.open_console(
        as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, log_format=log_format, resumable=True
    )
    wishes = {"--memory": memory, "--engine": engine, "--hardware": hardware, "--context": model_context}
    if recommend:
        chosen = {"--recipe": recipe, "--scheme": scheme, "--method": method, "--transform": transform, "--kv": kv,
                  "--finish": finish,
                  "--layer": layer, "--format": format, "-o": output}  # fmt: skip
        for flag in (flag for flag, value in chosen.items() if value):
            raise UsageError(f"--recommend chooses by itself and writes nothing: {flag} means nothing with it")
        from qtool.checkpoint.hub import open_headers
        from qtool.recommend import CONTEXT, parse_memory, recommendation_view
        from qtool.recommend import recommend as choose

        budget = parse_memory(memory) if memory else None
        found = choose(open_headers(model), engine, hardware, budget, model_context or CONTEXT, has_data=data != "none")
        console.result(found.to_tree(), recommendation_view(found))
        return 0
    for flag in (flag for flag, value in wishes.items() if value is not None):
        raise UsageError(f"{flag} means nothing without --recommend", "add --recommend")
    rows_asked = {"--data": data, "--rows": rows, "--seqlen": seqlen, "--pack/--no-pack": pack, "--seed": seed}
    for flag in (flag for flag, value in rows_asked.items() if stats and value is not None):
        raise UsageError(f"{flag} means nothing with --stats, which stand for the data", f"leave {flag} or --stats out")
    for flag, kind, given in (("--transform", "transforms", transform), ("--finish", "finishes", finish)):
        for names in (names for names in given or [] if "," in names):
            flags = " ".join(f"{flag} {name.strip()}" for name in names.split(","))
            raise UsageError(f"`{flag} {names}` names several {kind}", f"give each its own flag: `{flags}`")
    tree: dict[str, Any] = load_tree(recipe) if recipe else {}
    if tree.keys() & {"student", "objective"}:
        raise UsageError(f"{recipe} is a recipe of `qtool distill`", f"`qtool distill {model} --recipe {recipe}`")
    for assignment in assignments or []:
        set_key(tree, assignment)
    options.put(tree, scheme=scheme, transforms=transform, method=method, finish=finish, format=format, kv=kv,
                stats=stats, strict=strict, requantize=requantize)  # fmt: skip
    options.put_into(tree, "data", source=data, rows=rows, seqlen=seqlen, pack=pack, seed=seed)
    gates = {"protocol": protocol, "max_ppl_increase": max_ppl_increase, "max_kl": max_kl}
    if evaluate:
        tree["eval"] = section(tree, "eval")
        options.put_into(tree["eval"], "data", source=evaluate)
    options.put_into(tree, "eval", **gates)
    for text in layer or []:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"`--layer {text}` is not PATTERN=SCHEME", "for example `--layer '*.down_proj=w8a16'`")
        tree["layers"] = {**section(tree, "layers"), pattern: value}
    if ignore:
        before = tree.get("ignore") or DEFAULT_IGNORE
        tree["ignore"] = [*([before] if isinstance(before, str) else before), *ignore]
    resolved = build(tree, [*METHODS, *TRANSFORMS, *FINISHES])
    from qtool.evaluation.gates import check_spec

    if resolved.method != AUTO and not resolved.finish:  # those that the method comes with
        method_options = resolved.options.get(resolved.method, {})
        resolved = replace(resolved, finish=get_method(resolved.method, method_options).finish)
    named = [] if resolved.method == AUTO else [resolved.method]
    for name in [*named, *sorted(set(METHODS) & resolved.options.keys())]:
        get_method(name, resolved.options.get(name, {}))
    for name in [*resolved.transforms, *sorted(set(TRANSFORMS) & resolved.options.keys())]:
        get_transform(name, resolved.options.get(name, {}))
    for name in [*resolved.finish, *sorted(set(FINISHES) & resolved.options.keys())]:
        get_finish(name, resolved.options.get(name, {}))
    if resolved.eval:
        check_spec(resolved.eval, has_baseline=True)
    if print_recipe:
        return options.show_recipe(console, to_tree(resolved), to_yaml(resolved))

    return execute(console, model, resolved, output, dry_run, device, force, batch_tokens)


def execute(
    console: Console,
    model: str,
    recipe: Recipe,
    output: Path | None,
    dry_run: bool,
    device: str,
    force: bool,
    batch_tokens: int,
) -> int:
    """Quantize by a recipe that is complete, or say what would be done; the exit code."""
    from qtool.job import describe, prepare
    from qtool.pipeline import RunOptions
    from qtool.pipeline import quantize as run
    from qtool.report.views import plan_view, report_view

    if output is None and not dry_run:
        raise UsageError("nowhere to write to", "give a folder with -o/--output, or look only with --dry-run")
    job = prepare(model, recipe)
    if dry_run:
        description = describe(job)
        console.result(description, plan_view(description))
        return 0
    assert output is not None
    options.check_folder(output)
    report, up_to_date = run(job, output, RunOptions(device, force, batch_tokens), console.progress)
    if report is None:  # the first of several processes says how it went
        return 0
    return options.conclude(console, output, report.to_tree(), report_view(report), up_to_date)
