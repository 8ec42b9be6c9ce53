"""From SQuAD's files to trees of token ids: questions below the paragraph that they share. Imports no torch."""
