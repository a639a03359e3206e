"""The online teacher: the fold's rule inside the training loop.

- `mean_teacher`: what a training loop calls, made of the others; `settings`: what it is told, checked
- `tracking`: which tensors of a module are followed; `shadows`: a teacher's own; `pairs`: each beside the student's
- `rule`: one update of tensors; `offload`: the same in host memory; `capture`: what a CUDA graph may hold of it
- `finiteness`, `stalls`: NaN, infinities, and updates that 16 bits lose
- `attachments`: optimizers that update a teacher; `swap`: its numbers in a module for a while
- `lineage`: which formula describes it; `state`: its state dict; `state_file`: that in a file
- `teacher_file`: a file of tensors with its record; `saving`: a whole teacher in one
- `snapshots`: averages beside it; `snapshot_folder`: their files; `increments`: how far the student moves
"""
