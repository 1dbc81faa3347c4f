//! The two shapes every contract file repeats.

/// A struct of named tensors (and plain scalars) that implements
/// [`Tensors`](crate::Tensors) in declaration order.
///
/// `pub struct Inputs<R>` holds activations of number type `R` beside tensors of fixed type, and
/// gets `lift`, which widens an `Inputs<f32>` exactly. Without `<R>`, `lift` is a clone.
#[macro_export]
macro_rules! tensors {
    ($(#[$doc:meta])* pub struct $name:ident<R> {
        $($(#[$field_doc:meta])* pub $field:ident: $kind:ty,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name<R = f32> { $($(#[$field_doc])* pub $field: $kind,)* }

        impl<R: $crate::Number> $name<R> {
            /// The same values in another number type, exactly.
            pub fn lift(from: &$name<f32>) -> Self {
                Self { $($field: $crate::tensor::Lift::lift(&from.$field),)* }
            }
        }

        impl<R: $crate::Number> $crate::tensor::Read for $name<R> {
            fn read(source: &dyn $crate::tensor::Source) -> Result<Self, String> {
                Ok(Self { $($field: $crate::tensor::ReadField::read_field(stringify!($field), source)?,)* })
            }
        }

        impl<R: $crate::Number> $crate::Tensors for $name<R> {
            fn names() -> &'static [&'static str] {
                &[$(stringify!($field)),*]
            }

            fn tensors(&self) -> Vec<(&'static str, $crate::View<'_>)> {
                let mut all = Vec::new();
                $($crate::tensor::Field::push(&self.$field, stringify!($field), &mut all);)*
                all
            }

            fn tensors_mut(&mut self) -> Vec<(&'static str, $crate::ViewMut<'_>)> {
                let mut all = Vec::new();
                $($crate::tensor::Field::push_mut(&mut self.$field, stringify!($field), &mut all);)*
                all
            }

            fn scalars(&self) -> Vec<(&'static str, f64)> {
                let all = [$((stringify!($field), $crate::tensor::Field::scalar(&self.$field))),*];
                all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
            }
        }
    };
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$field_doc:meta])* pub $field:ident: $kind:ty,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }

        impl $name {
            /// The same values: nothing here depends on the number type.
            pub fn lift(from: &Self) -> Self {
                from.clone()
            }
        }

        impl $crate::tensor::Read for $name {
            fn read(source: &dyn $crate::tensor::Source) -> Result<Self, String> {
                Ok(Self { $($field: $crate::tensor::ReadField::read_field(stringify!($field), source)?,)* })
            }
        }

        impl $crate::Tensors for $name {
            fn names() -> &'static [&'static str] {
                &[$(stringify!($field)),*]
            }

            fn tensors(&self) -> Vec<(&'static str, $crate::View<'_>)> {
                let mut all = Vec::new();
                $($crate::tensor::Field::push(&self.$field, stringify!($field), &mut all);)*
                all
            }

            fn tensors_mut(&mut self) -> Vec<(&'static str, $crate::ViewMut<'_>)> {
                let mut all = Vec::new();
                $($crate::tensor::Field::push_mut(&mut self.$field, stringify!($field), &mut all);)*
                all
            }

            fn scalars(&self) -> Vec<(&'static str, f64)> {
                let all = [$((stringify!($field), $crate::tensor::Field::scalar(&self.$field))),*];
                all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
            }
        }
    };
}

/// A struct of sizes that prints as `B1-T65-HK16` and parses back.
#[macro_export]
macro_rules! case {
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$field_doc:meta])* $tag:literal $field:ident,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: usize,)* }

        impl $crate::Case for $name {
            const LETTERS: &'static [&'static str] = &[$($tag),*];

            fn sizes(&self) -> Vec<usize> {
                vec![$(self.$field),*]
            }

            fn from_sizes(sizes: &[usize]) -> Self {
                let mut sizes = sizes.iter().copied();
                $(let $field = sizes.next().expect("one size per letter");)*
                Self { $($field),* }
            }
        }
    };
}
