"""What a policy's answers are like and how that is shown: metrics, intervals, tables, figures, report."""
