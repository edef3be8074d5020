"""What a user sees: schemas, checks of arguments, one call below. One file per family, no maths."""
