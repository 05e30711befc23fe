"""Passes over the dense model before the block loop, made only if an assigned method asks for them.

    gradients   some method ranks weights by the gradient of the loss        (gradients.py)
    survey      some method divides its budget among blocks                  (survey.py)

Gradients come first, because a survey may ask for them. Both keep what they find in the working folder of the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from whit.methods.statistics import Statistic
from whit.pipeline.assign import Assignment
from whit.pipeline.engine import Run
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.gradient_task import GradientTask, gradient_layers, single_sequences
from whit.pipeline.gradients import gather_gradients
from whit.pipeline.survey import Survey, SurveyTask, allocate, survey_blocks, surveying_methods


def has_passes(assignment: Assignment) -> bool:
    """Whether anything runs before the block loop."""
    return bool(gradient_layers(assignment) or surveying_methods(assignment))


def run_passes(run: Run) -> Run:
    """Make the passes that the assigned methods ask for, from where an earlier run left off.

    Returns:
        the run with its gradients, and with each block's own method in place of one that divides its budget.

    Raises:
        ModelError: the loss or a gradient of the model is NaN, Inf or zero; a survey found no usable number.
    """
    folder = run.journal.folder
    survey = Survey(folder, run.assignment)
    layers = gradient_layers(run.assignment)
    surveyed = any(Statistic.GRADIENT in method.survey_required() for method in surveying_methods(run.assignment))
    if layers and (not set(layers) <= set(run.journal.units) or (surveyed and not survey.complete)):
        store = GradientStore(folder)
        for note in store.notes:
            run.listener.note(note)
        stage = dataclasses.replace(run.stage, dtype=torch.float32)
        gather_gradients(GradientTask(stage, single_sequences(run.batches), layers, store, run.listener))
        run = dataclasses.replace(run, gradients=store)
    survey_blocks(SurveyTask(run.stage, run.batches, run.assignment, run.gradients, run.listener), survey)
    return dataclasses.replace(run, assignment=allocate(run.assignment, survey.allocation()))


def recorded_allocation(folder: Path, assignment: Assignment) -> list[dict[str, Any]]:
    """How budgets were divided, for the result: one entry per method that divides its budget.

    Args:
        folder: working folder of a run whose passes are done. assignment: with the methods as they were asked for.
    """
    survey = Survey(folder, assignment)
    return [item.to_json() for item in survey.allocation()] if survey.complete else []
