"""Models of others in, models of ours out: transformers checkpoints to run folders, runs to checkpoints and GGUF files.

A family of theirs is two tables: of settings (:mod:`.settings`) and of tensors (:mod:`.links`), each read in both
directions. :mod:`.families` has those of transformers, :mod:`.llama_cpp` those of llama.cpp, and adding a family is
adding one there. What a family cannot represent is found by going there and back (:mod:`.representation`).
:mod:`.importing`, :mod:`.exporting` and :mod:`.gguf_file` do the work, :mod:`.upcycle` makes experts of a dense model.
"""
