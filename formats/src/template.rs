//! Path templates of `info.json`: Python's `str.format`, as far as LeRobot uses it.
//!
//! `{name}`, `{name:d}` and `{name:03d}`, with `{{` and `}}` for braces. What comes out must stay below the dataset's
//! directory: it is relative and never goes up.

use std::path::{Component, Path, PathBuf};

/// A template with its placeholders parsed.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// Name, and the least number of digits where it says so.
    Field {
        name: String,
        width: usize,
        zeros: bool,
        integer: bool,
    },
}

/// A value for a placeholder.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fill<'a> {
    Number(u64),
    Text(&'a str),
}

/// What is wrong with a template or with what it makes; the template's text is part of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path template {template:?}: {what}")]
pub(crate) struct TemplateError {
    template: String,
    what: String,
}

/// Digits that a width may ask for.
const WIDEST: usize = 32;

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self, TemplateError> {
        let wrong = |what: String| TemplateError { template: text.to_owned(), what };
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            match c {
                '{' | '}' if rest.peek() == Some(&c) => {
                    literal.push(c);
                    rest.next();
                }
                '}' => return Err(wrong("a `}` that closes nothing".to_owned())),
                '{' => {
                    let mut field = String::new();
                    loop {
                        match rest.next() {
                            Some('}') => break,
                            Some(c) => field.push(c),
                            None => return Err(wrong("a `{` that is never closed".to_owned())),
                        }
                    }
                    parts.push(Part::Text(std::mem::take(&mut literal)));
                    parts.push(parse_field(&field).ok_or_else(|| {
                        wrong(format!("{{{field}}} is not understood; {{name}} and {{name:03d}} are"))
                    })?);
                }
                c => literal.push(c),
            }
        }
        parts.push(Part::Text(literal));
        parts.retain(|part| *part != Part::Text(String::new()));
        Ok(Self { text: text.to_owned(), parts })
    }

    /// A glob pattern of every path it can make.
    pub(crate) fn pattern(&self) -> String {
        let part = |part: &Part| match part {
            Part::Text(text) => glob::Pattern::escape(text),
            Part::Field { .. } => "*".to_owned(),
        };
        self.parts.iter().map(part).collect()
    }

    /// The path these values make, relative to the dataset.
    pub(crate) fn fill(&self, values: &[(&str, Fill<'_>)]) -> Result<PathBuf, TemplateError> {
        let wrong = |what: String| TemplateError { template: self.text.clone(), what };
        let mut out = String::new();
        for part in &self.parts {
            let (name, width, zeros, integer) = match part {
                Part::Text(text) => {
                    out.push_str(text);
                    continue;
                }
                Part::Field { name, width, zeros, integer } => (name, *width, *zeros, *integer),
            };
            let value = values.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
            match value {
                Some(Fill::Number(number)) if zeros => out += &format!("{number:0width$}"),
                Some(Fill::Number(number)) => out += &format!("{number:width$}"),
                Some(Fill::Text(text)) if !integer => out += text,
                Some(Fill::Text(_)) => return Err(wrong(format!("{name} is text, not a number"))),
                None => {
                    let known: Vec<&str> = values.iter().map(|(known, _)| *known).collect();
                    return Err(wrong(format!("{name:?} is not known here; {} are", known.join(", "))));
                }
            }
        }
        let path = Path::new(&out);
        let inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if out.is_empty() || !inside || out.contains('\0') {
            return Err(wrong(format!("{out:?} does not stay inside the dataset's directory")));
        }
        Ok(path.to_owned())
    }
}

fn parse_field(field: &str) -> Option<Part> {
    let (name, spec) = field.split_once(':').unwrap_or((field, ""));
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    let integer = spec.ends_with('d');
    let digits = spec.strip_suffix('d').unwrap_or(spec);
    let zeros = digits.starts_with('0');
    let width = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    (width <= WIDEST && (integer || spec.is_empty())).then(|| Part::Field {
        name: name.to_owned(),
        width,
        zeros,
        integer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str) -> Result<PathBuf, TemplateError> {
        Template::parse(template)?.fill(&[
            ("chunk_index", Fill::Number(7)),
            ("file_index", Fill::Number(1234)),
            ("video_key", Fill::Text("observation.images.top")),
        ])
    }

    #[test]
    fn placeholders_are_filled_as_python_fills_them() {
        for (template, path) in [
            (
                "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                "data/chunk-007/file-1234.parquet",
            ),
            ("{chunk_index}-{chunk_index:d}-{chunk_index:02d}", "7-7-07"),
            ("{chunk_index:3d}", "  7"),
            ("a{{b}}c/{video_key}.mp4", "a{b}c/observation.images.top.mp4"),
            ("plain.parquet", "plain.parquet"),
        ] {
            assert_eq!(fill(template).unwrap(), Path::new(path), "{template}");
        }
    }

    #[test]
    fn a_path_that_leaves_the_dataset_is_refused() {
        for template in ["../{chunk_index}", "/data/{chunk_index}", "data/../../etc/passwd", "", "a\0b"] {
            let error = fill(template).unwrap_err().to_string();
            assert!(error.contains("does not stay inside"), "{template}: {error}");
        }
        let up = Template::parse("{video_key}/x").unwrap().fill(&[("video_key", Fill::Text(".."))]);
        assert!(up.unwrap_err().to_string().contains("does not stay inside"));
    }

    #[test]
    fn what_is_not_understood_says_so() {
        for (template, what) in [
            ("{chunk_index", "never closed"),
            ("chunk_index}", "closes nothing"),
            ("{chunk_index:>3}", "not understood"),
            ("{chunk_index:999999999d}", "not understood"),
            ("{}", "not understood"),
            ("{a.b}", "not understood"),
            ("{episode_index}", "chunk_index, file_index, video_key"),
            ("{video_key:03d}", "is text"),
        ] {
            let error = fill(template).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("path template"), "{template}: {error}");
        }
    }
}
