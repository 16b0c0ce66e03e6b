"""Terminal table, figures, report.html."""
