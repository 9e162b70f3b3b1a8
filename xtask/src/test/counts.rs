//! How many tests passed, from what the test runners print.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// Outcomes of tests.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Counts {
    pub const PASSED: Self = Self { passed: 1, failed: 0, skipped: 0 };
    pub const FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };

    /// The counts in a closing line of cargo's test runner, of pytest, or of `sim/capi/tests/smoke.py`; None in any other
    /// line.
    pub fn in_line(line: &str) -> Option<Self> {
        let line = line.trim_matches(|c: char| c == '=' || c.is_whitespace());
        let cargo = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")).map(|(_, rest)| rest);
        let pytest = line.rsplit_once(" in ").filter(|(_, time)| time.starts_with(|c: char| c.is_ascii_digit()));
        let smoke = || line.split_once(" (PyTorch ").map(|(counts, _)| counts);
        let text = cargo.or(pytest.map(|(counts, _)| counts)).or_else(smoke)?;
        let mut counts = Self::default();
        let mut any = false;
        for part in text.split([',', ';']) {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            any = true;
            match what {
                "passed" | "xfailed" => counts.passed += number,
                "failed" | "error" | "errors" | "xpassed" => counts.failed += number,
                "ignored" | "skipped" => counts.skipped += number,
                _ => {}
            }
        }
        any.then_some(counts)
    }
}

impl Add for Counts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// The closing line: `N passed, N failed`, and what was skipped.
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 { write!(f, ", {} skipped", self.skipped) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Option<Counts> {
        Some(Counts { passed, failed, skipped })
    }

    #[test]
    fn closing_lines_are_understood() {
        let cargo =
            "test result: FAILED. 12 passed; 2 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.01s";
        assert_eq!(Counts::in_line(cargo), counts(12, 2, 3));
        let pytest = "==== 3 failed, 320 passed, 2 skipped, 5 deselected, 1 warning, 1 error in 123.40s (0:02:03) ====";
        assert_eq!(Counts::in_line(pytest), counts(320, 4, 2));
        assert_eq!(Counts::in_line("7 passed in 0.5s"), counts(7, 0, 0));
        assert_eq!(Counts::in_line("31 passed, 1 failed (PyTorch 2.15.0+cu132)"), counts(31, 1, 0));
        for other in ["running 12 tests", "test a::b ... ok", "no tests ran in 0.01s", "it came in 12 parts", ""] {
            assert_eq!(Counts::in_line(other), None, "{other}");
        }
    }

    #[test]
    fn closing_line_is_plain() {
        let all: Counts =
            [Counts::PASSED, Counts::FAILED, Counts { passed: 2, failed: 0, skipped: 4 }].into_iter().sum();
        assert_eq!(all.to_string(), "3 passed, 1 failed, 4 skipped");
        assert_eq!(Counts::PASSED.to_string(), "1 passed, 0 failed");
    }
}
