//! `robocache.toml` as it is written: keys and the types of their values, and nothing of what they mean together.
//!
//! A key that is not here is refused. What `check` may refuse carries its place in the text, so that errors name the
//! line. Streams keep the order of the file.

use std::collections::BTreeMap;

use robocache_types::Interp;
use serde::Deserialize;
use toml::Spanned;

use super::Arrangement;
use crate::filter::Wanted;
use crate::time::{Duplicates, Order, Unit};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawManifest {
    pub(super) layout: Arrangement,
    pub(super) episodes: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) streams: RawStreams,
    pub(super) frames: Option<Spanned<RawFrames>>,
}

/// A table in the order of the file, with where each entry stands in it.
#[derive(Default)]
pub(super) struct RawStreams(pub(super) Vec<(String, Spanned<RawStream>)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStream {
    pub(super) file: Option<String>,
    pub(super) time: Option<RawTime>,
    pub(super) rate: Option<f64>,
    pub(super) columns: Option<Vec<String>>,
    pub(super) r#where: Option<BTreeMap<String, Wanted>>,
    pub(super) order: Option<Order>,
    pub(super) duplicates: Option<Duplicates>,
    pub(super) interp: Option<Interp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFrames {
    pub(super) files: Option<String>,
    pub(super) episode: Option<String>,
    pub(super) time: Option<RawTime>,
    pub(super) r#where: Option<BTreeMap<String, Wanted>>,
    pub(super) order: Option<Order>,
    pub(super) duplicates: Option<Duplicates>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTime {
    pub(super) column: Option<String>,
    pub(super) unit: Option<Unit>,
    pub(super) rate: Option<f64>,
}

impl<'de> Deserialize<'de> for RawStreams {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> serde::de::Visitor<'de> for InOrder {
            type Value = RawStreams;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table of streams, each [streams.NAME]")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<RawStreams, A::Error> {
                let mut streams = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    streams.push(entry);
                }
                Ok(RawStreams(streams))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Manifest;

    fn refusal(text: &str) -> String {
        Manifest::parse(text, Path::new("flights/robocache.toml")).unwrap_err().to_string()
    }

    #[test]
    fn what_toml_refuses_names_file_line_and_the_values_allowed() {
        for (text, wanted) in [
            (
                "layout = \"stream\"",
                &["line 1", "flights/robocache.toml", "`streams`, `frames`, `nested`", "layout ="][..],
            ),
            ("layout = \"streams\"\nlayuot = 1", &["line 2", "`layuot`", "`episodes`"][..]),
            (
                "layout = \"streams\"\n[streams.a]\ntime = { column = \"t\", unit = \"min\" }",
                &["line 3", "`s`, `ms`, `us`, `ns`", "unit = \"min\""][..],
            ),
            ("layout = \"streams\"\n[streams.a]\norder = \"up\"", &["line 3", "`error` or `sort`"][..]),
            ("layout = \"streams\"\n[streams.a]\nfiel = \"x\"", &["line 3", "`fiel`", "`file`"][..]),
            (
                "layout = \"streams\"\n[streams.a]\nwhere = { I = [1] }",
                &["line 3", "a boolean, an integer"][..],
            ),
            ("layout = [", &["line 1"][..]),
        ] {
            let error = refusal(text);
            assert!(wanted.iter().all(|part| error.contains(part)), "{text}\n-> {error}");
        }
    }
}
