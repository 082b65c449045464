"""The journal: between two checkpoints, each step as the gradients that it was made with; and how such steps are made again.

repeatable   which optimizers' steps come out the same
layout       what lies where in a record
chain        which checkpoint of a run is a record, and on what it builds
whether      there is a journal, and how long it is
links        what a record is made of
made         a step that was made and is in no record yet
looks        the tensors of layers as steps left them: what changed outside
length       how far apart full checkpoints are, where that is left to us
digests      of layers, as the step left them
replay       steps made again, from a checkpoint and the records behind it
shown        by a device, that such steps have the bits that they had
machine      what steps were made by, and where
"""
