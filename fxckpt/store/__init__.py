"""The directory a run checkpoints into: what is in it, who may write it, and in which order.

======================  ==================================================================================
file                    owns
======================  ==================================================================================
``names``               what files, directories and keys are called
``dtypes``              types of elements: safetensors', torch's and numpy's names, sizes; tensors as bytes
``checks``              what nobody has vouched for: JSON, bounded, and whether values are what they should be
``layout``              where each tensor lies in a safetensors file
``typed_json``          Python values as JSON that brings back exactly what it was given
``record``              ``commit.json``: what makes a directory a checkpoint
``identity``            ``store.json``: whose directory it is
``lock``                one writer per directory
``files``               writing one small file durably; the guard before a file is rewritten in place
``slots``               ``Store``: opening, acquiring, the commit order
``slot``, ``pool``      one directory to write in; all of them, and the moves between free, busy and committed
``commit_loop``         the thread that takes checkpoints to their commit, in the trainer or in a monitor
``retention``           which checkpoint continues which, and which is given up next
``reader``, ``info``    listing, verifying and reading, safe while a trainer writes; what users are told
======================  ==================================================================================

Nothing here imports torch. ``docs/format.md`` is the format for a reader in another language.
"""
