"""The exercises of the course (docs/course): files to fill in, and the checks that judge them. Nothing imports this
folder but `quire course`; it can be deleted."""
