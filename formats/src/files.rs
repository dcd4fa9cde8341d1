//! Finding a dataset's files below its root.
//!
//! What a glob finds is in natural order ("ep_2" before "ep_10"), the same on every machine. Hidden files are not
//! found by a wildcard. Patterns were checked by the manifest: none leads out of the root.

use std::cmp::Ordering;
use std::io;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern, glob_with};

use crate::error::OpenError;

/// What matches `pattern` below `root`, in natural order. An error where nothing does.
pub(crate) fn find(root: &Path, pattern: &str) -> Result<Vec<PathBuf>, OpenError> {
    let odd = |what: &str| OpenError::Metadata { path: root.to_owned(), what: what.to_owned() };
    let root_text = root.to_str().ok_or_else(|| odd("a path that is not UTF-8 cannot be searched"))?;
    let full = format!("{}/{pattern}", Pattern::escape(root_text.trim_end_matches('/')));
    let options = MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let matches =
        glob_with(&full, options).map_err(|error| odd(&format!("{pattern:?} is no glob: {}", error.msg)))?;
    let mut paths = Vec::new();
    for found in matches {
        let io =
            |error: glob::GlobError| OpenError::Io { path: error.path().to_owned(), source: error.into() };
        paths.push(found.map_err(io)?);
    }
    if paths.is_empty() {
        return Err(odd(&format!("nothing matches {pattern:?}")));
    }
    paths.sort_by(|a, b| natural(&relative(root, a), &relative(root, b)));
    Ok(paths)
}

/// A path below `root` as text, with `/` between its parts.
pub(crate) fn relative(root: &Path, path: &Path) -> String {
    let parts = path.strip_prefix(root).unwrap_or(path).components();
    parts.map(|part| part.as_os_str().to_string_lossy().into_owned()).collect::<Vec<_>>().join("/")
}

/// Compares text as people do: runs of digits by their value. A total order: ties go by bytes.
pub(crate) fn natural(a: &str, b: &str) -> Ordering {
    let (mut rest_a, mut rest_b) = (a, b);
    while !rest_a.is_empty() && !rest_b.is_empty() {
        let (digits_a, digits_b) = (leading_digits(rest_a), leading_digits(rest_b));
        let order = if digits_a.is_empty() || digits_b.is_empty() {
            let (char_a, char_b) = (rest_a.chars().next(), rest_b.chars().next());
            rest_a = &rest_a[char_a.map_or(0, char::len_utf8)..];
            rest_b = &rest_b[char_b.map_or(0, char::len_utf8)..];
            char_a.cmp(&char_b)
        } else {
            (rest_a, rest_b) = (&rest_a[digits_a.len()..], &rest_b[digits_b.len()..]);
            let (value_a, value_b) = (digits_a.trim_start_matches('0'), digits_b.trim_start_matches('0'));
            value_a.len().cmp(&value_b.len()).then_with(|| value_a.cmp(value_b))
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    rest_a.len().cmp(&rest_b.len()).then_with(|| a.cmp(b))
}

fn leading_digits(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    &text[..end]
}

/// Size of a file that must be there.
pub(crate) fn size_of_file(path: &Path) -> io::Result<u64> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_file() { Ok(metadata.len()) } else { Err(io::Error::other("not a regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_are_compared_by_value() {
        let mut names = ["ep_10/a", "ep_2/a", "ep_2/A", "ep_02/a", "ep", "ep_2", "zeta", "Ep_1", "ep_2a"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["Ep_1", "ep", "ep_2", "ep_2/A", "ep_02/a", "ep_2/a", "ep_2a", "ep_10/a", "zeta"]);
    }

    #[test]
    fn a_glob_finds_below_the_root_only_and_takes_its_name_literally() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a[1]*");
        for name in ["ep_10", "ep_9", ".hidden"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        let found = find(&root, "*").unwrap();
        assert_eq!(found.iter().map(|path| relative(&root, path)).collect::<Vec<_>>(), ["ep_9", "ep_10"]);
        let error = find(&root, "no*").unwrap_err().to_string();
        assert!(error.contains("nothing matches \"no*\""), "{error}");
    }
}
