"""`qtool distill`: a teacher and a recipe in, a smaller trained student and the verdict out."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from qtool import recipe as quantize_recipe
from qtool.cli import options, state
from qtool.cli.options import put_into
from qtool.cli.quantize import execute
from qtool.distill.recipe import IMPORTANCES, Distillation, build, quantized, to_tree, to_yaml
from qtool.errors import UsageError
from qtool.recipe import load_tree, section, set_key
from qtool.training.objective import DIVERGENCES
from qtool.training.options import PRECISIONS

# Keys that only a recipe of that command has.
OF_QUANTIZE, OF_DISTILL = (
    {field.name for field in fields(kind)} - {"data", "eval"} for kind in (quantize_recipe.Recipe, Distillation)
)


def command(
    context: typer.Context,
    model: options.Teacher,
    output: options.Output = None,
    recipe: options.RecipeFile = None,
    student: Annotated[
        str | None, typer.Option("--student", metavar="MODEL", help="A model of its own, with the teacher's tokenizer.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Cut the student out of the teacher: so many of its layers.")
    ] = None,
    drop_layers: Annotated[
        str | None, typer.Option("--drop-layers", metavar="3,5", help="All layers but these, counted from 0.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            "--importance",
            metavar="NAME",
            help=f"Which --layers stay: {', '.join(IMPORTANCES)} (evenly spaced, or those that change most).",
        ),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option("--hidden", min=1, help="Keep so many channels of the hidden states, the most active.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Keep so many attention heads of a layer.")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option("--kv-heads", min=1, help="Keys and values for them (as many heads to each as before)."),
    ] = None,
    mlp: Annotated[int | None, typer.Option("--mlp", min=1, help="Keep so many channels inside the MLP.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="The student is the teacher quantized so (w4a16, nvfp4, q4_k_m, ...), and packed."
        ),
    ] = None,
    finish: Annotated[
        list[str] | None,
        typer.Option("--finish", metavar="NAME", help="With --scheme, what is trained: scales, full or lora (scales)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Text to train on: python-docs, a file, a folder, or a data set id (org/name:config)."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=2, help="At most so many rows (all there are; of a data set id 2048).")
    ] = None,
    seqlen: options.SeqLen = None,
    pack: options.Pack = None,
    divergence: Annotated[
        str | None,
        typer.Option("--divergence", metavar="NAME", help=f"From the teacher: {', '.join(DIVERGENCES)} (kl)."),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha", metavar="A", help="Its weight; cross entropy has the rest (1). `1:0.5` goes from 1 to 0.5."
        ),
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option("--temperature", metavar="T", help="Of both distributions; `4:1` goes from 4 to 1 (1)."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Learn so many of the teacher's most likely tokens (all).")
    ] = None,
    cache_teacher: Annotated[
        int | None,
        typer.Option(
            "--cache-teacher", metavar="K", min=1, help="Likewise, cached on disk: small, whatever the teacher."
        ),
    ] = None,
    hidden_mse: Annotated[
        float | None,
        typer.Option("--hidden-mse", min=0, help="Weight of the error of the hidden states (0); a live teacher."),
    ] = None,
    attention_mse: Annotated[
        float | None, typer.Option("--attention-mse", min=0, help="Weight of that of the attention's outputs (0).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the optimizer.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Times through all rows (as --steps take, else 1).")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows per step (8).")] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", min=1, help="Parts that a batch is split into; memory only (1).")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The highest learning rate (1e-4).")] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", min=1, help="Stop after so many evaluations that were no better (never)."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="NAME", help=f"Of matrix products: {', '.join(PRECISIONS)} (float32)."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which rows, and in which order (0).")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Measure teacher and student on this text.")
    ] = None,
    protocol: options.Protocol = None,
    max_ppl_increase: options.MaxPplIncrease = None,
    max_kl: options.MaxKl = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, such as training.warmup=0.1."),
    ] = None,
    print_recipe: options.PrintRecipe = False,
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
    """Train a smaller student to say what TEACHER says, into OUT.

    Interrupted, the same command goes on where it stopped; done, it says so and changes nothing. Under torchrun all
    processes train together.

    \b
    qtool distill ./llama --layers 16 -o ./llama-16 --data code.jsonl --eval wiki.txt
    qtool distill ./llama --hidden 2048 --mlp 5504 -o ./llama-narrow --data code.jsonl --steps 2000 --lr 3e-4
    qtool distill ./llama --scheme w2a16 -o ./llama-w2 --data code.jsonl --eval wiki.txt
    qtool distill ./llama --student ./small -o ./small-distilled --data code.jsonl --alpha 0.5 --temperature 2
    torchrun --nproc-per-node 2 -m qtool distill ./llama --layers 16 -o ./llama-16 --data code.jsonl
    """
    console = state.open_console(
        as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, log_format=log_format, resumable=True
    )
    tree: dict[str, Any] = load_tree(recipe) if recipe else {}
    if tree.keys() & OF_QUANTIZE and not tree.keys() & OF_DISTILL:
        raise UsageError(f"{recipe} is a recipe of `qtool quantize`", f"`qtool quantize {model} --recipe {recipe}`")
    for assignment in assignments or []:
        set_key(tree, assignment)
    dropped = None if drop_layers is None else _numbers("--drop-layers", drop_layers)
    put_into(tree, "student", path=student, layers=layers, drop_layers=dropped, importance=importance, hidden=hidden,
             heads=heads, kv_heads=kv_heads, mlp=mlp)  # fmt: skip
    put_into(tree, "data", source=data, rows=rows, seqlen=seqlen, pack=pack, seed=seed)
    put_into(tree, "objective", divergence=divergence, alpha=alpha, temperature=temperature, top_k=top_k,
             hidden=hidden_mse, attention=attention_mse)  # fmt: skip
    put_into(tree, "training", steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr,
             patience=patience, precision=precision, seed=seed)  # fmt: skip
    options.put(tree, cache_teacher=cache_teacher)
    if evaluate:
        tree["eval"] = section(tree, "eval")
        put_into(tree["eval"], "data", source=evaluate)
    put_into(tree, "eval", protocol=protocol, max_ppl_increase=max_ppl_increase, max_kl=max_kl)
    options.put(tree, scheme=scheme, finish=finish)
    if tree.get("scheme"):
        by_scheme = quantized(tree)
        if print_recipe:
            return options.show_recipe(console, quantize_recipe.to_tree(by_scheme), quantize_recipe.to_yaml(by_scheme))
        return execute(console, model, by_scheme, output, dry_run, device, force, batch_tokens)
    if tree.pop("finish", None):
        raise UsageError("--finish means nothing without --scheme", "it trains a student that is the teacher quantized")
    resolved = build(tree)
    from qtool.evaluation.gates import check_spec

    if resolved.eval:
        check_spec(resolved.eval, has_baseline=True)
    if print_recipe:
        return options.show_recipe(console, to_tree(resolved), to_yaml(resolved))
    from qtool.distill.job import describe, prepare
    from qtool.report.distill_view import distill_plan_view, distill_view

    if output is None and not dry_run:
        raise UsageError("nowhere to write to", "give a folder with -o/--output, or look only with --dry-run")
    job = prepare(model, resolved)
    if dry_run:
        description = describe(job)
        console.result(description, distill_plan_view(description))
        return 0
    assert output is not None
    options.check_folder(output)
    from qtool.distill.run import distill
    from qtool.pipeline import RunOptions

    report, up_to_date = distill(job, output, RunOptions(device, force, batch_tokens), console.progress)
    if report is None:  # the first of several processes says how it went
        return 0
    return options.conclude(console, output, report, distill_view(report), up_to_date)


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"`{flag} {text}` takes whole numbers with commas between them", f"`{flag} 3,5`") from None
