"""A plan as chapters, and as JSON in the one form of all figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from infra.cluster.machines import Machine
from infra.cluster.plan import Plan
from infra.cluster.report.answer import answer_chapter
from infra.cluster.report.chapter import Chapter
from infra.cluster.report.memory import memory_chapter
from infra.cluster.report.model import model_chapter
from infra.cluster.report.money import cost_chapter
from infra.cluster.report.network import network_chapter
from infra.cluster.report.schedules import schedules_chapter
from infra.cluster.report.serving import serving_chapter
from infra.cluster.report.training import step_chapter, steps
from infra.cluster.training.layout import Layout


def tell(plan: Plan) -> list[Chapter]:
    """Every chapter, in the order in which one asks."""
    asked = plan.request
    found = steps(plan.step, asked.published_run, measured=asked.times is not None)
    return [
        answer_chapter(plan),
        model_chapter(asked.shape, asked.layout.length, asked.published_model),
        step_chapter(found, plan.phases),
        cost_chapter(found, plan.phases, asked.stated_hours, asked.price, asked.published_run),
        memory_chapter(plan),
        schedules_chapter(),
        network_chapter(asked.shape, asked.layout, asked.machine),
        *serving_chapter(asked),
    ]


def to_json(machine: Machine, chapters: Sequence[Chapter], layout: Layout | None = None) -> str:
    """`{"machine": ..., "rows": [...]}` of the machine that is planned for; the layout, tables and notes
    beside."""
    rows = [
        asdict(row) | {"name": f"{chapter.title}: {row.name}"} for chapter in chapters for row in chapter.rows
    ]
    tables = [
        {"chapter": chapter.title, "title": table.title, "head": table.head, "rows": table.rows}
        for chapter in chapters
        for table in chapter.tables
    ]
    notes = [{"chapter": chapter.title, "text": text} for chapter in chapters for text in chapter.notes]
    told = {"machine": asdict(machine), "rows": rows, "tables": tables, "notes": notes}
    if layout:
        told["layout"] = asdict(layout) | {"recompute": sorted(layout.recompute)}
    return json.dumps(told, indent=2, allow_nan=False) + "\n"
