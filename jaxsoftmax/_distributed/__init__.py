"""What is behind `python -m jaxsoftmax.distributed_demo`: each file does one thing.

`cli` starts it, as `launch` of several processes or as one of them, a `worker`, which trains the
`model` on a `text`.
"""
