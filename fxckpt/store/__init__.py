"""The directory a run checkpoints into: what is in it, who may write it, and in which order.

======================  ==================================================================================
module                  owns
======================  ==================================================================================
``layout``              where each tensor lies in a safetensors file
``typed_json``          Python values as JSON that brings back exactly what it was given
``record``              ``commit.json``: what makes a directory a checkpoint
``names``               which directory entry means what
``lock``                one writer per directory
``files``               writing one small file durably; the guard before a file is rewritten in place
``slots``               ``Store``: the commit order, slots, lineage
``commit_loop``         the thread that takes checkpoints to their commit, in the trainer or in a monitor
``retention``           which checkpoint is given up next
``reader``              listing, verifying and reading, safe while a trainer writes
======================  ==================================================================================

Nothing here imports torch. ``docs/format.md`` is the format for a reader in another language.
"""
