"""Training data: the rows that models were fed, kept, exported and computed anew."""
