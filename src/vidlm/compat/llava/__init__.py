"""The few names of the LLaVA research code that Slow-Fast's model card uses.

A script runs with `llava.` replaced by `vidlm.compat.llava.`. New code is shorter with
`vidlm.load(name).ask(video, question)`.
"""
