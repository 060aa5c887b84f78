"""Measurements beside peers: `python -m benchmarks`, or one topic: `python -m benchmarks.mappings`.

A topic says what is compared, as data: `Comparison`s of functions on the same arguments. How it is
measured, written down and drawn is the same for all:

    measuring.py     times taken in turn, ratios within each round, memory, compile time
    transforms.py    gradients, tangents and products of a Hessian, of any function
    limits.py        what the machine can do at best: a copy, a matrix product
    peers.py         functions of other libraries, those that may be missing among them
    ahead.py         programs for devices that are not there, and what they should take
    hlo.py           the text of a compiled program
    kernels.py       what such a program does
    collectives.py   what of it crosses devices
    environment.py   the machine, versions, date and load
    tables.py        Markdown
    charts.py        pictures
    command.py       the command line, the progress bar and the files
"""
