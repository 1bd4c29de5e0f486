"""The `edgetune-rt` command: what a device needs, and nothing of the cloud side.

One file a command, loaded when that command is asked for.
"""
