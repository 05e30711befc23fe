"""A list of steps that several threads work through together, without waking anyone up in between.

Steps stand in phases. The parts of a phase are taken in turn by whoever is free; when the last of them is done the
next phase begins. Nobody waits for a thread that has not come yet: a helper that is late, or whose core is taken by
other work, leaves more parts to the others. Each part is computed in the same way whoever takes it, so results do not
depend on the number of threads.
"""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from whit.kernels.cpu.compiling import compiled
from whit.kernels.cpu.words import WORD, call, let_others_run, pause, read, take_next, word, write

FUNCTION, PARTS, LENGTH, ITEMS, ARGUMENTS = range(5)
STEP_WORDS = 28
FIRST, STEPS, ALL_PARTS, TOGETHER = range(4)
PHASE_WORDS = 4
TURN, DONE = 0, 8  # words of the control block, a cache line apart
CONTROL_WORDS = 16
PATIENCE = 2000


@njit(forceinline=True, error_model="numpy")
def _run_step(step, part):
    length, items = word(step, LENGTH), word(step, ITEMS)
    start = part * length
    call(word(step, FUNCTION), step + ARGUMENTS * WORD, start, min(start + length, items))


@njit(forceinline=True, error_model="numpy")
def _run_part(phase, steps, part):
    step = steps + word(phase, FIRST) * STEP_WORDS * WORD
    if word(phase, TOGETHER):
        for _ in range(word(phase, STEPS)):
            for each in range(word(step, PARTS)):
                _run_step(step, each)
            step += STEP_WORDS * WORD
        return
    while part >= word(step, PARTS):
        part -= word(step, PARTS)
        step += STEP_WORDS * WORD
    _run_step(step, part)


@compiled
def begin(control, number):
    """Let phase `number` begin."""
    write(control + TURN * WORD, number << 32)


@compiled
def work(phases, steps, control, count, last):
    """Take parts until phase number `last` has begun.

    Phases are numbered from 0 on through all runs; after the `count` phases of a run comes one without parts.
    """
    waited = 0
    while True:
        turn = read(control + TURN * WORD)
        if turn >> 32 >= last:
            return
        phase = phases + (turn >> 32) % (count + 1) * PHASE_WORDS * WORD
        if (turn & 0xFFFFFFFF) >= word(phase, ALL_PARTS):
            waited += 1
            if waited < PATIENCE:
                pause()
            else:
                let_others_run()
            continue
        waited = 0
        # Others may have moved on since: what is taken is what the number was, in whatever phase.
        turn = take_next(control + TURN * WORD)
        number, part = turn >> 32, turn & 0xFFFFFFFF
        phase = phases + number % (count + 1) * PHASE_WORDS * WORD
        parts = word(phase, ALL_PARTS)
        if part < parts:
            _run_part(phase, steps, part)
            if take_next(control + DONE * WORD) + 1 == parts:
                write(control + DONE * WORD, 0)
                write(control + TURN * WORD, (number + 1) << 32)
